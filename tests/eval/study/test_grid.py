"""Which runs a study asks for, that finished ones are kept, and what failures do."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from corda_core.files import write_whole
from corda_eval.records import write_sealed
from corda_eval.study import grid
from corda_eval.study.grid import BASE, Planned, StudyConfig, check, complete, finished, missing, planned
from corda_vlm import outputs
from corda_vlm.yaml import read_config

CONFIGS = Path(__file__).parents[3] / "configs"


def study(folder: Path, **changes: object) -> StudyConfig:
    config = StudyConfig(
        settings={"sums": {"kind": "smollm2_lines", "steps": 3}},
        arms={"lora": {"method": "lora", "rank": 4}, "strict": {"method": "corda", "rank": 8, "protect": "strict", "rates": (1e-3, 3e-3)}},
        rates=(1e-4, 3e-4, 1e-3),
        seeds=3,
        results=str(folder),
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def outcome(planned_run: Planned, gain: float, forgetting: float) -> dict[str, object]:
    """A result as ``corda_eval.study.worker`` writes it: base losses are 2 (target) and 3 (kept)."""
    scores = {"target": {"loss": 2 - gain, "accuracy": 10.0}, "docs": {"loss": 3 + forgetting, "accuracy": None}}
    if planned_run.arm == BASE:
        return {"spec": dataclasses.asdict(planned_run.spec), "scores": scores, "validation": 2.0}
    return {
        "spec": dataclasses.asdict(planned_run.spec),
        "scores": scores,
        "validation_losses": [[0, 2.0], [3, 2 - gain]],
        "interpolated": {},
        "change": 0.1,
        "change_on_context": 0.2,
        "trainable_parameters": 7,
        "seconds": {"prepare": 1.0, "train": 2.0},
        "peak_memory_gb": 1.5,
        "diverged": False,
    }


def write(config: StudyConfig, planned_run: Planned, gain: float = 0.0, forgetting: float = 0.0, **more: object) -> None:
    path = Path(config.results) / planned_run.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(outcome(planned_run, gain, forgetting) | more).encode())


def wanted(config: StudyConfig) -> list[tuple[str, float, int]]:
    return [(item.arm, item.spec.rate, item.spec.seed) for item in missing(config, "sums")]


def test_rates_that_do_not_climb_run_with_all_seeds_one_seed_after_the_other(tmp_path: Path) -> None:
    config = study(tmp_path, climb=False, seeds=2)
    write(config, planned(config, "sums", BASE, 0.0, 0))
    one = [("lora", 1e-4), ("lora", 3e-4), ("lora", 1e-3), ("strict", 1e-3), ("strict", 3e-3)]
    assert wanted(config) == [(arm, rate, seed) for seed in range(2) for arm, rate in one]
    write(config, planned(config, "sums", "strict", 3e-3, 0), 1.0, 0.1)
    assert ("strict", 1e-2, 0) not in wanted(config)
    assert len(wanted(config)) == 9


def test_a_setting_may_have_interpolations_of_its_own(tmp_path: Path) -> None:
    config = study(tmp_path, alphas=(0.5,))
    other = dataclasses.replace(config, settings={"sums": {**config.settings["sums"], "alphas": (0.25, 0.75)}})
    assert [planned(each, "sums", "lora", 1e-3, 0).spec.alphas for each in (config, other)] == [[0.5], [0.25, 0.75]]
    assert planned(other, "sums", "lora", 1e-3, 0).spec.setting == config.settings["sums"]
    with pytest.raises(ValueError, match="The alphas of the setting sums are 0.5; expected a list of numbers"):
        check(dataclasses.replace(config, settings={"sums": {**config.settings["sums"], "alphas": 0.5}}))


def test_arms_may_have_seeds_of_their_own_and_rates_off_the_ladder_where_nothing_climbs(tmp_path: Path) -> None:
    arms = {"lora": {"method": "lora", "rank": 4, "rates": (1.8e-3,)}, "wide": {"method": "lora", "rank": 8, "rates": (1e-3,), "seeds": 1}}
    config = study(tmp_path, arms=arms, climb=False, seeds=2)
    check(config)
    write(config, planned(config, "sums", BASE, 0.0, 0))
    assert wanted(config) == [("lora", 1.8e-3, 0), ("wide", 1e-3, 0), ("lora", 1.8e-3, 1)]
    assert wanted(replaced_setting(config, seeds=1)) == [("lora", 1.8e-3, 0), ("wide", 1e-3, 0)]
    assert "seeds" not in (planned(config, "sums", "wide", 1e-3, 0).spec.method or {})
    with pytest.raises(ValueError, match="rate 0.0018 is not on the ladder"):
        check(dataclasses.replace(config, climb=True))
    with pytest.raises(ValueError, match="arm wide asks for 0 seeds"):
        check(dataclasses.replace(config, arms=arms | {"wide": arms["wide"] | {"seeds": 0}}))


def replaced_setting(config: StudyConfig, **options: object) -> StudyConfig:
    return dataclasses.replace(config, settings={"sums": {**config.settings["sums"], **options}})


def test_the_base_is_first_then_the_first_seed_then_edges_then_the_other_seeds(tmp_path: Path) -> None:
    config = study(tmp_path)
    assert wanted(config) == [(BASE, 0.0, 0)]
    write(config, planned(config, "sums", BASE, 0.0, 0))
    assert wanted(config) == [("lora", 1e-4, 0), ("lora", 3e-4, 0), ("lora", 1e-3, 0), ("strict", 1e-3, 0), ("strict", 3e-3, 0)]
    for rate, gain, forgetting in ((1e-4, 0.5, 0.05), (3e-4, 1.0, 0.2), (1e-3, 0.9, 0.5)):
        write(config, planned(config, "sums", "lora", rate, 0), gain, forgetting)
    for rate, gain, forgetting in ((1e-3, 0.7, 0.01), (3e-3, 0.98, 0.02)):
        write(config, planned(config, "sums", "strict", rate, 0), gain, forgetting)
    # strict's best is at its upper edge, LoRA's is not.
    assert wanted(config) == [("strict", 1e-2, 0)]
    write(config, planned(config, "sums", "strict", 1e-2, 0), 1.2, 0.3)
    assert wanted(config) == [("strict", 3e-2, 0)]
    write(config, planned(config, "sums", "strict", 3e-2, 0), diverged=True)
    # LoRA: 3e-4 is tuned and matched. strict: 1e-2 is tuned, 3e-3 is enough for LoRA's gain.
    expected = [("lora", 3e-4, 1), ("lora", 3e-4, 2), ("strict", 3e-3, 1), ("strict", 3e-3, 2), ("strict", 1e-2, 1), ("strict", 1e-2, 2)]
    assert wanted(config) == expected
    for arm, rate, seed in expected:
        write(config, planned(config, "sums", arm, rate, seed), 1.0, 0.1)
    assert wanted(config) == []
    assert len(finished(config, "sums")) == 14
    assert wanted(study(tmp_path, seeds=4)) == [("lora", 3e-4, 3), ("strict", 3e-3, 3), ("strict", 1e-2, 3)]


def test_a_rate_that_other_seeds_fail_at_gives_way_to_the_next_best(tmp_path: Path) -> None:
    config = study(tmp_path, settings={"sums": {"kind": "smollm2_lines", "steps": 3, "arms": ["lora"]}})
    write(config, planned(config, "sums", BASE, 0.0, 0))
    for rate, gain in ((1e-4, 0.5), (3e-4, 1.0), (1e-3, 0.9)):
        write(config, planned(config, "sums", "lora", rate, 0), gain, rate)
    write(config, planned(config, "sums", "lora", 3e-4, 1), 0.0, 0.2)
    write(config, planned(config, "sums", "lora", 3e-4, 2), 0.1, 0.2)
    assert wanted(config) == [("lora", 1e-3, 1), ("lora", 1e-3, 2)]


def test_rates_go_down_while_the_lowest_learns_nearly_as_much_as_lora(tmp_path: Path) -> None:
    config = study(tmp_path, seeds=1)
    write(config, planned(config, "sums", BASE, 0.0, 0))
    for rate, gain in ((1e-4, 0.98), (3e-4, 1.0), (1e-3, 0.9)):
        write(config, planned(config, "sums", "lora", rate, 0), gain, rate)
    for rate, gain in ((1e-3, 0.96), (3e-3, 1.2), (1e-2, 0.1)):
        write(config, planned(config, "sums", "strict", rate, 0), gain, rate)
    assert wanted(config) == [("lora", 3e-5, 0), ("strict", 3e-4, 0)]
    write(config, planned(config, "sums", "lora", 3e-5, 0), 0.8, 0.0)
    write(config, planned(config, "sums", "strict", 3e-4, 0), 0.94, 0.0)
    assert wanted(config) == []


def test_a_setting_has_its_own_beginning_for_some_arms(tmp_path: Path) -> None:
    setting = {"kind": "smollm2_lines", "steps": 3}
    config = study(tmp_path, settings={"sums": {**setting, "rates": {"lora": (1e-5, 3e-5)}}})
    write(config, planned(config, "sums", BASE, 0.0, 0))
    assert wanted(config) == [("lora", 1e-5, 0), ("lora", 3e-5, 0), ("strict", 1e-3, 0), ("strict", 3e-3, 0)]
    assert planned(config, "sums", "lora", 1e-5, 0) == planned(study(tmp_path), "sums", "lora", 1e-5, 0)


def test_the_ladder_ends(tmp_path: Path) -> None:
    config = study(tmp_path, arms={"lora": {"method": "lora", "rank": 4, "rates": (1e-1, 3e-1)}}, seeds=1)
    write(config, planned(config, "sums", BASE, 0.0, 0))
    write(config, planned(config, "sums", "lora", 1e-1, 0), 0.1)
    write(config, planned(config, "sums", "lora", 3e-1, 0), 0.2)
    assert wanted(config) == []


def test_results_of_other_options_are_no_part_of_a_study(tmp_path: Path) -> None:
    config = study(tmp_path)
    write(config, planned(config, "sums", BASE, 0.0, 0))
    write(config, planned(config, "sums", "lora", 1e-4, 0), 0.5)
    assert len(finished(config, "sums")) == 2
    other = study(tmp_path, settings={"sums": {"kind": "smollm2_lines", "steps": 4}})
    assert finished(other, "sums") == []
    wider = study(tmp_path, arms=config.arms | {"lora": {"method": "lora", "rank": 5}})
    assert [run.arm for run in finished(wider, "sums")] == [BASE]
    assert planned(config, "sums", "lora", 1e-4, 0).file_name != planned(wider, "sums", "lora", 1e-4, 0).file_name


def test_arms_are_told_apart_whatever_they_are_called(tmp_path: Path) -> None:
    lora = {"method": "lora", "rank": 4}
    config = study(tmp_path, arms={"lora": lora, "lora-b": lora, "strict [docs]": lora})
    for arm in ("lora-b", "strict [docs]"):
        write(config, planned(config, "sums", arm, 1e-4, 0), 0.5)
    assert [(run.arm, run.rate) for run in finished(config, "sums")] == [("lora-b", 1e-4), ("strict [docs]", 1e-4)]


def test_runs_of_another_base_are_refused(tmp_path: Path) -> None:
    config = study(tmp_path)
    write(config, planned(config, "sums", BASE, 0.0, 0), base_digest="old")
    write(config, planned(config, "sums", "lora", 1e-4, 0), 0.5, base_digest="old")
    assert len(finished(config, "sums")) == 2
    write(config, planned(config, "sums", "lora", 3e-4, 0), 0.5, base_digest="new")
    with pytest.raises(ValueError, match=r"sums/base-0-0-\w+\.json and sums/lora-0\.0003-0-\w+\.json were made on different base weights"):
        finished(config, "sums")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"sums": {"kind": "smollm2_lines", "arms": ["lora", "kpm"]}}}, "'kpm'"),
        ({"settings": {"sums": {"kind": "smollm2_lines", "arms": ["strict"]}}}, "no arm called 'lora'"),
        ({"seeds": 0}, "0 seeds"),
        ({"rates": ()}, "'lora' cannot run in the setting sums"),
        ({"seeds": "three"}, "'three' seeds"),
        ({"rates": (2e-4,)}, "0.0002"),
        ({"settings": {"sums": None}}, "setting 'sums' is None"),
        ({"settings": ["sums"]}, r"expected its options by name"),
        ({"arms": {"lora": "lora"}}, "arm 'lora' is 'lora'"),
        ({"settings": {"sums": {"kind": "smollm2_lines", "rates": [1e-3]}}}, r"'sums' has the rates \[0\.001\]"),
        ({"settings": {"sums": {"kind": "smollm2_lines", "arms": None}}}, "'sums' has the arms None"),
        ({"settings": {"sums": {"kind": "smollm2_lines", "rates": {"lora": 1e-3}}}}, "rates of lora in the setting sums are 0.001"),
        ({"rates": ("1e-3",)}, "YAML reads 1e-3 as text"),
        ({"arms": {"lora": {"method": "lora", "rank": 4, "rates": 1e-3}}}, "rates of the arm lora are 0.001"),
        ({"alphas": 0.5}, "alphas are 0.5"),
        ({"arms": {"lora": {"method": "lorra", "rank": 4}}}, "'lorra' is unknown"),
        ({"arms": {"lora": {"method": "lora", "rang": 4}}}, "did you mean 'rank'"),
        ({"settings": {"sums": {"kind": "smollm2"}}}, "'smollm2' is unknown"),
        ({"settings": {"sums": {"kind": "smollm2_lines", "rates": {"lora": (4e-4,)}}}}, "0.0004"),
        ({"settings": {"sums": {"kind": "smollm2_lines", "rates": {"lorra": (3e-4,)}}}}, "'lorra'"),
        (
            {"settings": {"../../sums": {"kind": "smollm2_lines", "arms": ["lora"]}}},
            "settings.* is '../../sums'; expected a plain file name",
        ),
        (
            {"arms": {"lora": {"method": "lora", "rank": 4}, "a/b": {"method": "lora", "rank": 4}}},
            "arms.* is 'a/b'; expected a plain file name",
        ),
        ({"arms": {"lora": {"method": "lora", "rank": 0}}}, "rank is 0; expected at least 1"),
        ({"workers": 0}, "workers is 0; expected at least 1"),
        ({"threads": 0.5}, "threads is 0.5; expected a whole number"),
    ],
)
def test_a_wrong_study_is_named(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check(study(tmp_path, **changes))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("compare_*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_name_what_there_is(path: Path) -> None:
    config = read_config(path, StudyConfig)
    check(config)


def test_a_failed_run_stops_its_arm_only_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = study(tmp_path, seeds=1, workers=2)

    def run(planned_run: Planned, folder: Path, threads: int) -> str | None:
        if planned_run.arm == "strict":
            return "ValueError: no such layer"
        write(config, planned_run, 0.5 if planned_run.spec.rate == 3e-4 else 0.1, 0.1)
        return None

    monkeypatch.setattr(grid, "_run", run)
    told: list[str] = []
    failures = complete(config, told.append)
    assert len(failures) == 1
    assert re.fullmatch(r"sums, strict at 0\.00[13]: ValueError: no such layer", failures[0])
    assert {run.arm for run in finished(config, "sums")} == {BASE, "lora"}
    assert any("failed" in line for line in told)


def test_other_seeds_run_although_an_arm_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(planned_run: Planned, folder: Path, threads: int) -> str | None:
        if planned_run.arm == "strict":
            return "no such layer"
        write(config, planned_run, 0.5 if planned_run.spec.rate == 3e-4 else 0.1, 0.1)
        return None

    config = study(tmp_path, seeds=2)
    monkeypatch.setattr(grid, "_run", run)
    assert len(complete(config, lambda line: None)) == 1
    assert {(run.rate, run.seed) for run in finished(config, "sums") if run.arm == "lora"} >= {(3e-4, 0), (3e-4, 1)}


def test_one_study_at_a_time_makes_runs_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "LOCK_WAIT", 0.1)
    config = study(tmp_path)
    with outputs.locked(tmp_path), pytest.raises(BlockingIOError, match="is in use by another run"):
        complete(config, lambda line: None)


def test_results_are_as_they_were_written_or_refused(tmp_path: Path) -> None:
    config = study(tmp_path)
    first = planned(config, "sums", BASE, 0.0, 0)
    write(config, first)
    path = tmp_path / first.file_name
    with pytest.warns(UserWarning, match="has no digest"):  # of version 0.1.0
        unsealed = finished(config, "sums")
    write_sealed(path, json.loads(path.read_text()))
    assert [run.result for run in finished(config, "sums")] == [run.result for run in unsealed]
    path.write_text(path.read_text().replace("1", "2", 1))
    with pytest.raises(ValueError, match=r"base-.*\.json is damaged: .*; remove it: the run is made again"):
        finished(config, "sums")


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    config = study(tmp_path)
    write(config, planned(config, "sums", BASE, 0.0, 0))
    (tmp_path / "sums" / "lora-x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lora-x\.json is no result of a run .*remove it"):
        finished(config, "sums")


def test_a_run_in_a_process_of_its_own_says_why_it_failed(tmp_path: Path) -> None:
    config = study(tmp_path, settings={"sums": {"kind": "sums"}})
    problem = grid._run(planned(config, "sums", BASE, 0.0, 0), tmp_path, 1)
    assert problem is not None
    assert "'sums' is unknown" in problem
    assert "smollm2_lines" in problem
    assert not list(tmp_path.glob("sums/*"))
