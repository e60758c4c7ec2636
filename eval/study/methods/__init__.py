"""The methods that a study can compare, one file each."""

from corda_eval.study.methods.bounded import Bounded
from corda_eval.study.methods.corda import Corda
from corda_eval.study.methods.dora import Dora
from corda_eval.study.methods.eva import Eva
from corda_eval.study.methods.full import Full
from corda_eval.study.methods.intruders import Intruders
from corda_eval.study.methods.kasa import Kasa
from corda_eval.study.methods.keep import Keep
from corda_eval.study.methods.l2_sp import L2Sp
from corda_eval.study.methods.lalora import Lalora
from corda_eval.study.methods.lora import Lora
from corda_eval.study.methods.lora_ga import LoraGa
from corda_eval.study.methods.lora_null import LoraNull
from corda_eval.study.methods.mica import Mica
from corda_eval.study.methods.milora import Milora
from corda_eval.study.methods.oplora import Oplora
from corda_eval.study.methods.osf import Osf
from corda_eval.study.methods.part import Part
from corda_eval.study.methods.pissa import Pissa
from corda_eval.study.methods.qlora import Qlora
from corda_eval.study.methods.sc_lora import ScLora
from corda_eval.study.methods.thanora import Thanora
from corda_eval.study.task import Method

METHODS: dict[str, type[Method]] = {
    "bounded": Bounded,
    "corda": Corda,
    "dora": Dora,
    "eva": Eva,
    "full": Full,
    "intruders": Intruders,
    "kasa": Kasa,
    "keep": Keep,
    "l2_sp": L2Sp,
    "lalora": Lalora,
    "lora": Lora,
    "lora_ga": LoraGa,
    "lora_null": LoraNull,
    "mica": Mica,
    "milora": Milora,
    "oplora": Oplora,
    "osf": Osf,
    "part": Part,
    "pissa": Pissa,
    "qlora": Qlora,
    "sc_lora": ScLora,
    "thanora": Thanora,
}
"""By the name that stands in a study's config."""
