"""The methods that a study can compare, one file each."""

from corda_eval.study.method import Method
from corda_eval.study.methods.corda import Corda
from corda_eval.study.methods.dora import Dora
from corda_eval.study.methods.eva import Eva
from corda_eval.study.methods.full import Full
from corda_eval.study.methods.kasa import Kasa
from corda_eval.study.methods.lora import Lora
from corda_eval.study.methods.lora_ga import LoraGa
from corda_eval.study.methods.mica import Mica
from corda_eval.study.methods.osf import Osf
from corda_eval.study.methods.pissa import Pissa
from corda_eval.study.methods.qlora import Qlora

METHODS: dict[str, type[Method]] = {
    "corda": Corda,
    "dora": Dora,
    "eva": Eva,
    "full": Full,
    "kasa": Kasa,
    "lora": Lora,
    "lora_ga": LoraGa,
    "mica": Mica,
    "osf": Osf,
    "pissa": Pissa,
    "qlora": Qlora,
}
"""By the name that stands in a study's config."""
