"""The methods that a study can compare, one file each."""

from corda_eval.study.method import Method
from corda_eval.study.methods.corda import Corda
from corda_eval.study.methods.lora import Lora
from corda_eval.study.methods.thanora import Thanora

METHODS: dict[str, type[Method]] = {"corda": Corda, "lora": Lora, "thanora": Thanora}
"""By the name that stands in a study's config."""
