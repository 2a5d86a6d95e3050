"""The attention of the models that kernels ship for, as their published configurations give it.

Each is also a preset: a name in place of a config.json, which `model_config` reads to the same
`Attention`. Tensor parallelism divides both numbers of heads and changes no kernel, as long as
every rank has a KV head of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from gqa_cutlass.codegen.schema.kinds import DType

FULL, SLIDING = "full_attention", "sliding_attention"  # as config.json calls them


@dataclass(frozen=True, kw_only=True)
class LayerType:
    """Layers of a model that attend alike.

    Args:
        name: As config.json calls them: "full_attention" or "sliding_attention".
        num_q_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Dimension per head of queries and keys.
        head_dim_v: That of values, if it is another one.
        window: Tokens attended to, the new one included; 0: all.
        softcap: Bound of the scores; 0: none.
        sinks: Whether every query head has one more logit.
        alibi: Whether scores have a bias by distance.
        num_layers: How many there are; 0: not known.
    """

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int | None = None
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    num_layers: int = 0

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def needs(self) -> tuple[str, ...]:
        """The options of a call that its layers ask for."""
        asked = {
            "window_size": self.window, "softcap": self.softcap, "sinks": self.sinks,
            "alibi_slopes": self.alibi,
        }  # fmt: skip
        return tuple(name for name, value in asked.items() if value)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """How one model attends.

    Args:
        name: As the user gave it.
        source: Where that was read: a repository of Hugging Face, or a file.
        dtypes: What it may be run in; none where it is of a type that kernels do not have.
        layer_types: At least one.
        others: Kinds of layers that keep no keys and values, and run no kernel of ours.
    """

    name: str
    source: str
    dtypes: tuple[DType, ...]
    layer_types: tuple[LayerType, ...]
    others: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Model:
    """One published model.

    Args:
        name: As users say it.
        num_q_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Dimension per head.
        source: Hugging Face repository whose config.json says so.
        window: Tokens that its windowed layers attend to; 0: it has none.
        full: Whether it has layers without a window.
        softcap: Bound of the scores; 0: none.
        sinks: Whether every query head has one more logit.
        dtype: What it is run in.
    """

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    source: str
    window: int = 0
    full: bool = True
    softcap: float = 0.0
    sinks: bool = False
    dtype: DType = DType.BF16

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def needs(self) -> tuple[str, ...]:
        """The options of a call that some of its layers ask for."""
        return self.attention.layer_types[0].needs

    @property
    def attention(self) -> Attention:
        """Its types of layers, those with a window first."""
        windows = [(SLIDING, self.window)] if self.window else []
        layers = windows + ([(FULL, 0)] if self.full else [])
        return Attention(
            name=self.name,
            source=self.source,
            dtypes=(self.dtype,),
            layer_types=tuple(
                LayerType(
                    name=name, window=window, num_q_heads=self.num_q_heads,
                    num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, softcap=self.softcap,
                    sinks=self.sinks,
                )
                for name, window in layers
            ),
        )  # fmt: skip


def _model(
    name: str, heads: tuple[int, int, int], source: str, *, window: int = 0, full: bool = True,
    softcap: float = 0.0, sinks: bool = False, dtype: DType = DType.BF16,
) -> Model:  # fmt: skip
    num_q_heads, num_kv_heads, head_dim = heads
    return Model(
        name=name, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        source=source, window=window, full=full, softcap=softcap, sinks=sinks, dtype=dtype,
    )  # fmt: skip


MODELS: tuple[Model, ...] = (
    _model("llama2-7b", (32, 32, 128), "meta-llama/Llama-2-7b-hf", dtype=DType.F16),
    _model("llama3.2-1b", (32, 8, 64), "meta-llama/Llama-3.2-1B"),
    _model("llama3.2-3b", (24, 8, 128), "meta-llama/Llama-3.2-3B"),
    _model("llama3-8b", (32, 8, 128), "meta-llama/Meta-Llama-3-8B"),
    _model("llama3.1-8b", (32, 8, 128), "meta-llama/Llama-3.1-8B"),
    _model("llama3-70b", (64, 8, 128), "meta-llama/Meta-Llama-3-70B"),
    _model("llama3.1-70b", (64, 8, 128), "meta-llama/Llama-3.1-70B"),
    _model("llama3.3-70b", (64, 8, 128), "meta-llama/Llama-3.3-70B-Instruct"),
    _model("llama3.1-405b", (128, 8, 128), "meta-llama/Llama-3.1-405B"),
    _model("qwen2.5-0.5b", (14, 2, 64), "Qwen/Qwen2.5-0.5B"),
    _model("qwen2.5-1.5b", (12, 2, 128), "Qwen/Qwen2.5-1.5B"),
    _model("qwen2.5-3b", (16, 2, 128), "Qwen/Qwen2.5-3B"),
    _model("qwen2.5-7b", (28, 4, 128), "Qwen/Qwen2.5-7B"),
    _model("qwen2.5-14b", (40, 8, 128), "Qwen/Qwen2.5-14B"),
    _model("qwen2.5-32b", (40, 8, 128), "Qwen/Qwen2.5-32B"),
    _model("qwen2.5-72b", (64, 8, 128), "Qwen/Qwen2.5-72B"),
    _model("qwen3-0.6b", (16, 8, 128), "Qwen/Qwen3-0.6B"),
    _model("qwen3-1.7b", (16, 8, 128), "Qwen/Qwen3-1.7B"),
    _model("qwen3-4b", (32, 8, 128), "Qwen/Qwen3-4B"),
    _model("qwen3-8b", (32, 8, 128), "Qwen/Qwen3-8B"),
    _model("qwen3-14b", (40, 8, 128), "Qwen/Qwen3-14B"),
    _model("qwen3-32b", (64, 8, 128), "Qwen/Qwen3-32B"),
    _model("qwen3-30b-a3b", (32, 4, 128), "Qwen/Qwen3-30B-A3B"),
    _model("qwen3-235b-a22b", (64, 4, 128), "Qwen/Qwen3-235B-A22B"),
    _model("phi2", (32, 32, 80), "microsoft/phi-2", dtype=DType.F16),
    _model("phi3-mini", (32, 32, 96), "microsoft/Phi-3-mini-128k-instruct"),
    _model("phi3-medium", (40, 10, 128), "microsoft/Phi-3-medium-128k-instruct"),
    _model("phi4", (40, 10, 128), "microsoft/phi-4"),
    _model("phi4-mini", (24, 8, 128), "microsoft/Phi-4-mini-instruct"),
    _model("mistral-7b-v0.1", (32, 8, 128), "mistralai/Mistral-7B-v0.1", window=4096, full=False),
    _model("mistral-7b", (32, 8, 128), "mistralai/Mistral-7B-v0.3"),
    _model("mistral-nemo", (32, 8, 128), "mistralai/Mistral-Nemo-Base-2407"),
    _model("mixtral-8x7b", (32, 8, 128), "mistralai/Mixtral-8x7B-v0.1"),
    _model("tinyllama", (32, 4, 64), "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    _model("gemma-2b", (8, 1, 256), "google/gemma-2b"),
    _model("gemma-7b", (16, 16, 256), "google/gemma-7b"),
    _model("gemma2-2b", (8, 4, 256), "google/gemma-2-2b", window=4096, softcap=50.0),
    _model("gemma2-9b", (16, 8, 256), "google/gemma-2-9b", window=4096, softcap=50.0),
    _model("gemma2-27b", (32, 16, 128), "google/gemma-2-27b", window=4096, softcap=50.0),
    _model("gemma3-1b", (4, 1, 256), "google/gemma-3-1b-it", window=512),
    _model("gemma3-4b", (8, 4, 256), "google/gemma-3-4b-it", window=1024),
    _model("gemma3-12b", (16, 8, 256), "google/gemma-3-12b-it", window=1024),
    _model("gemma3-27b", (32, 16, 128), "google/gemma-3-27b-it", window=1024),
    _model("gpt-oss-20b", (64, 8, 64), "openai/gpt-oss-20b", window=128, sinks=True),
    _model("gpt-oss-120b", (64, 8, 64), "openai/gpt-oss-120b", window=128, sinks=True),
    _model("falcon-40b", (128, 8, 64), "tiiuae/falcon-40b"),
)
