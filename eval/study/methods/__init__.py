"""The methods that a study can compare, one file each."""

from corda_eval.study.method import Method
from corda_eval.study.methods.corda import Corda
from corda_eval.study.methods.lalora import Lalora
from corda_eval.study.methods.lora import Lora
from corda_eval.study.methods.lora_null import LoraNull
from corda_eval.study.methods.milora import Milora
from corda_eval.study.methods.oplora import Oplora
from corda_eval.study.methods.sc_lora import ScLora

METHODS: dict[str, type[Method]] = {
    "corda": Corda,
    "lalora": Lalora,
    "lora": Lora,
    "lora_null": LoraNull,
    "milora": Milora,
    "oplora": Oplora,
    "sc_lora": ScLora,
}
"""By the name that stands in a study's config."""
