"""The examples, run as they are: on the CPU at toy sizes, on a GPU at real ones."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from compiling import GROUP
from helpers import REPOSITORY

pytestmark = [pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.xdist_group(GROUP)]

EXAMPLES = REPOSITORY / "examples"


def example(name: str) -> ModuleType:
    """An example's module; on a machine with a GPU it uses that."""
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_by_a_test() -> None:
    text = Path(__file__).read_text()
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names and not [name for name in names if f'example("{name}")' not in text]


def test_demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its models the smallest; `make demo` has all."""
    module = example("demo")
    monkeypatch.setattr(module, "MODELS", module.MODELS[:1])
    monkeypatch.setattr(module, "ON_CPU", replace(module.ON_CPU, prompt=5, tokens=1))
    assert module.main() == 0
    printed = capsys.readouterr().out
    assert "1 kernels serve 1 models" in printed and "Qwen2.5-0.5B" in printed


def test_decode_loop() -> None:
    assert example("decode_loop").main() < 2e-3


def test_cuda_graph(capsys: pytest.CaptureFixture[str]) -> None:
    module = example("cuda_graph")
    assert module.main() == [module.ROOM] * module.BATCH
    assert "one more: " in capsys.readouterr().out


def test_compile() -> None:
    torch._dynamo.reset()
    module = example("compile")
    assert module.main() == ([4] * module.BATCH, 1)


def test_transformers_generate() -> None:
    pytest.importorskip("transformers")
    ours, eager = example("transformers_generate").main()
    assert torch.equal(ours, eager)


def test_transformers_batches() -> None:
    pytest.importorskip("transformers")
    ours, alone = example("transformers_batches").main()
    assert ours == alone


def test_speculative_decoding() -> None:
    plain, ours, steps = (module := example("speculative_decoding")).main()
    assert torch.equal(plain, ours) and plain.unique().numel() > 4
    assert steps < module.TOKENS - 1


def test_qwen3_layer() -> None:
    assert example("qwen3_layer").main() < 2e-2


def test_shared_prefix() -> None:
    assert example("shared_prefix").main() < 2e-3


def test_continuous_batching(capsys: pytest.CaptureFixture[str]) -> None:
    """Requests wait for pages, and all of them get what they get alone."""
    module = example("continuous_batching")
    assert module.main() < 1e-2
    served, free = capsys.readouterr().out.splitlines()[-2:]
    assert served.startswith(f"{module.REQUESTS} requests served, ") and " 0 times" not in served
    assert free.startswith(f"{module.PAGES} of {module.PAGES} pages are free")


def test_context_parallel() -> None:
    """Of one rank; what several do is tested with them."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert example("context_parallel").main() < 2e-3
    finally:
        dist.destroy_process_group()


def test_offline_bundle() -> None:
    served = example("offline_bundle").main()
    assert served.startswith("served [1, ")


def test_arrays() -> None:
    """Five keys of 1 with values of 1, and the new one: a key of 1/2 with a value of 2."""
    library = pytest.importorskip("cupy" if torch.cuda.is_available() else "numpy")
    weights = torch.softmax(torch.tensor([8.0] * 5 + [4.0]), 0)
    expected = float((weights * torch.tensor([1.0] * 5 + [2.0])).sum())
    out = example("arrays").main(library)
    assert isinstance(out, library.ndarray) and abs(out - expected).max() < 1e-3


def test_the_script_in_the_readme(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands, with a tiny model and a tokenizer of numbers instead of those it fetches."""
    transformers = pytest.importorskip("transformers")
    text = (REPOSITORY / "README.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    script = next(block for block in blocks if "GqaCache" in block)
    assert sum(bool(line) for line in script.splitlines()) <= 15
    device = "cuda" if torch.cuda.is_available() else "cpu"

    class Tokenizer:
        def __call__(self, prompts: list[str], **_: object) -> object:
            ids = torch.tensor([[0, 0, 11, 12], [21, 22, 23, 24]])
            return transformers.BatchEncoding(
                {"input_ids": ids, "attention_mask": (ids != 0).long()}
            )

        def batch_decode(self, tokens: torch.Tensor, **_: object) -> list[str]:
            return [str(row.tolist()) for row in tokens]

    def model(name: str, **options: object) -> object:
        assert name == "Qwen/Qwen3-8B" and options["dtype"] is torch.bfloat16
        config = transformers.Qwen3Config(
            vocab_size=64, hidden_size=256, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=1, head_dim=64, pad_token_id=0,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return made.to(device).eval()

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: Tokenizer())
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    script = script.replace("max_new_tokens=100", "max_new_tokens=3").replace("cuda", device)
    exec(compile(script, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [len(line.split(",")) for line in lines] == [4 + 3] * 2
