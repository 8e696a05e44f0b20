"""vLLM's models with branches, one for each of `ARCHITECTURES`."""

from dera_peft.vllm.versions import check_version

check_version()  # before vLLM's parts are imported, of which another version may have none

from vllm.model_executor.models.gemma import GemmaForCausalLM  # noqa: E402
from vllm.model_executor.models.llama import LlamaForCausalLM  # noqa: E402
from vllm.model_executor.models.mistral import MistralForCausalLM  # noqa: E402
from vllm.model_executor.models.phi3 import Phi3ForCausalLM  # noqa: E402
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM  # noqa: E402
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM  # noqa: E402

from dera_peft.vllm.branched import Branched  # noqa: E402


class DeRaLlamaForCausalLM(Branched, LlamaForCausalLM):
    pass


class DeRaQwen2ForCausalLM(Branched, Qwen2ForCausalLM):
    pass


class DeRaQwen3ForCausalLM(Branched, Qwen3ForCausalLM):
    pass


class DeRaMistralForCausalLM(Branched, MistralForCausalLM):
    pass


class DeRaGemmaForCausalLM(Branched, GemmaForCausalLM):
    pass


class DeRaPhi3ForCausalLM(Branched, Phi3ForCausalLM):
    pass
