"""`ft export`: what is written loads elsewhere, in processes that never hear of this package; the rest is refused."""

from __future__ import annotations

import ast
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ft, tensors
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.adapters import consumers, load, uniform
from finetune.commands import export, merge
from finetune.errors import UserError
from finetune.models import loading, sources, tokenizers
from finetune.recipe.adapters import ADAPTERS
from finetune.recipe.sections import ModelConfig
from finetune.resources import BUILTIN_MODELS, resource_path

IDS = list(range(40, 60))
OF_PEFT = [
    "lora",
    "adalora",
    "vera",
    "oft",
    "loha",
    "lokr",
    "ia3",
    "prompt_tuning",
    "p_tuning",
    "prefix_tuning",
    "ln_tuning",
]
OWN = ["bitfit", "bottleneck", "last_layers"]
SIZES: dict[str, dict[str, Any]] = {"vera": {"r": 8}, "oft": {"oft_block_size": 16}, "last_layers": {"num_layers": 1}}
ALONE = """
import json, sys
sys.modules["finetune"] = None  # as if it were not installed
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
jobs, out = json.loads(sys.argv[1]), {}
for name, (base, adapter) in jobs.items():
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    assert AutoTokenizer.from_pretrained(adapter or base)("a b")["input_ids"]
    with torch.inference_mode():
        out[name] = model.eval()(input_ids=torch.tensor([json.loads(sys.argv[3])])).logits.contiguous()
del sys.modules["finetune"]
for name, line in json.loads(sys.argv[4]).items():
    base = AutoModelForCausalLM.from_pretrained(sys.argv[5], dtype=torch.float32)
    exec(line)
    with torch.inference_mode():
        out[name] = model.eval()(input_ids=torch.tensor([json.loads(sys.argv[3])])).logits.contiguous()
save_file(out, sys.argv[2])
"""


def config_of(base: Path | str) -> ModelConfig:
    return ModelConfig(name=str(base), sanity_check=False)


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=torch.tensor([IDS])).logits
    return found


def trained(base: Path | str, method: str, folder: Path) -> torch.Tensor:
    """An adapter of a method as a run of ours leaves it, away from its start; what it computes."""
    torch.manual_seed(0)
    model, tokenizer = loading.load_model(config_of(base), torch.float32), tokenizers.load_tokenizer(config_of(base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = load.apply(model, ADAPTERS[method](**SIZES.get(method, {})), tokenizer)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    load.save(adapted, folder)
    tokenizer.save_pretrained(folder)
    return logits(adapted)


@dataclass
class Elsewhere:
    expected: dict[str, torch.Tensor]
    found: dict[str, torch.Tensor]
    plain: torch.Tensor
    """Of the base alone."""


@pytest.fixture(scope="module")
def elsewhere(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    """Exports of every method and merged models, loaded by a process of its own, where only the lines that are printed
    for our own types find this package."""
    folder = tmp_path_factory.mktemp("elsewhere")
    expected, jobs = {}, {}
    for method in OF_PEFT:
        expected[method] = trained(base, method, folder / method)
        export.run(str(folder / method), "peft", str(folder / f"{method} for peft"), model=str(base))
        jobs[method] = (str(base), str(folder / f"{method} for peft"))
    expected["vllm"] = expected["lora"]
    export.run(str(folder / "lora"), "vllm", str(folder / "for vllm"), model=str(base))
    jobs["vllm"] = (str(base), str(folder / "for vllm"))
    for name in ("tiny-llama", "tiny-chatglm3"):
        expected[name] = trained(name, "lora", folder / f"on {name}")
        merge.run(str(folder / f"on {name}"), str(folder / f"merged {name}"), model=name, dtype="float32",
                  max_shard_size="1MB")  # fmt: skip
        jobs[name] = (str(folder / f"merged {name}"), None)
    lines = {}
    for method in OWN:
        expected[method] = trained(base, method, folder / method)
        with pytest.raises(UserError, match=f"{method} is no type of peft's") as caught:
            export.run(str(folder / method), "peft", str(folder / "out"), model=str(base))
        lines[method] = str(caught.value).partition("in Python: ")[2]
        assert not (folder / "out").exists()
    words = [json.dumps(jobs), str(folder / "found"), json.dumps(IDS), json.dumps(lines), str(base)]
    done = subprocess.run([sys.executable, "-c", ALONE, *words], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return Elsewhere(expected, load_file(folder / "found"), logits(AutoModelForCausalLM.from_pretrained(base)))


@pytest.mark.parametrize("method", [*OF_PEFT, "vllm"])
def test_an_adapter_loads_in_plain_peft(method: str, elsewhere: Elsewhere) -> None:
    expected, found = elsewhere.expected[method], elsewhere.found[method]
    assert not torch.allclose(expected[:, -1], elsewhere.plain[:, -1], atol=1e-4)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-chatglm3"])
def test_a_merged_model_loads_in_plain_transformers(name: str, elsewhere: Elsewhere) -> None:
    """In several shards; ChatGLM, too."""
    torch.testing.assert_close(elsewhere.found[name], elsewhere.expected[name], atol=2e-4, rtol=0)


@pytest.mark.parametrize("method", OWN)
def test_our_own_types_are_loaded_by_the_lines_that_are_printed(method: str, elsewhere: Elsewhere) -> None:
    """Plain peft knows no such type: the refusal has the Python that loads them."""
    torch.testing.assert_close(elsewhere.found[method], elsewhere.expected[method], atol=1e-5, rtol=0)


# --- limits ---


def lora(base: Path, folder: Path, std: float = 0.05, **keys: Any) -> Path:
    """As plain peft makes it."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "task_type": TaskType.CAUSAL_LM,
        "r": 4,
        "lora_alpha": 10,
        "target_modules": ["q_proj", "down_proj"],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{**settings, **keys}))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * std)
        adapted.save_pretrained(folder, save_embedding_layers=False)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


LIMITS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "has use_dora: DoRA is not read by vLLM"),
    "bias": ({"bias": "lora_only"}, "has bias: trained biases of the base are not read"),
    "lora_bias": ({"lora_bias": True}, "has lora_bias"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [5]}}, "has trainable_token_indices"),
    "rank": ({"r": 600}, r"its rank is 600, and vLLM 0.33.0 reads 512 at most \(--max-lora-rank\)"),
    "rank of one layer": ({"rank_pattern": {"down_proj": 513}}, "its rank is 513"),
}


@pytest.mark.parametrize(("keys", "expected"), LIMITS.values(), ids=LIMITS)
def test_a_limit_is_named_before_anything_is_written(
    keys: dict[str, Any], expected: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora(base, tmp_path / "a", **keys)
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("the base was loaded"))
    with pytest.raises(UserError, match=expected) as caught:
        export.run(str(tmp_path / "a"), "vllm", str(tmp_path / "out"), model=str(base))
    assert "→ merge it (ft merge)" in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("method", ["ia3", "prompt_tuning", "bottleneck", "bitfit"])
def test_vllm_reads_lora_only(method: str, base: Path, tmp_path: Path) -> None:
    """What can be merged is to be merged, and what cannot is loaded in Python."""
    trained(base, method, tmp_path / "a")
    done = ft("export", tmp_path / "a", "--for", "vllm", "--output", tmp_path / "out", "--model", base)
    assert done.returncode == 2
    fix = "merge it (ft merge)" if method in ("ia3", "bitfit") else "in Python: "
    assert f"→ {fix}" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_bases_that_vllm_has_no_adapters_on(base: Path, tmp_path: Path) -> None:
    folder = lora(base, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    names = sorted(tensors(folder))
    consumers.check_names("vllm", names, "llama", folder)
    with pytest.raises(UserError, match=r"reaches embeddings or the head \(.*lm_head.lora_A.weight\), where vLLM"):
        consumers.check_names("vllm", names, "qwen2", folder)
    with pytest.raises(UserError, match=r"vLLM 0\.33\.0 has no class for gpt2 that takes adapters"):
        consumers.check_base("vllm", "gpt2", folder)
    with pytest.raises(UserError, match="original layout"):
        consumers.check_base("peft", "chatglm", folder)
    with pytest.raises(UserError, match=r"holds base_model.model.model.embed_tokens.weight, which vLLM"):
        consumers.check_names("vllm", [*names, "base_model.model.model.embed_tokens.weight"], "llama", folder)
    expert = "base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_A.weight"
    with pytest.raises(UserError, match="reaches experts"):
        consumers.check_names("vllm", [expert], "mixtral", folder)


def test_loftq_fits_its_int4_base_alone(tmp_path: Path) -> None:
    stored = {"peft_type": "LORA", "r": 4, "bias": "none", "init_lora_weights": True}
    with pytest.raises(
        UserError, match=r"loftq\): it fits the int4 base alone → merge it \(ft merge --base dequantized"
    ):
        consumers.check("vllm", stored, tmp_path, "loftq")
    consumers.check("vllm", stored, tmp_path, "default")


PATTERNS: dict[str, dict[str, Any]] = {
    "ranks": {"rank_pattern": {"layers.1.self_attn.q_proj": 7, "down_proj": 2}},
    "scales": {"alpha_pattern": {"down_proj": 3, "layers.0.self_attn.q_proj": 17}},
    "both, rsLoRA": {"rank_pattern": {"down_proj": 6}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"embed_tokens": 6}},
}


@pytest.mark.parametrize("keys", PATTERNS.values(), ids=PATTERNS)
def test_ranks_and_scales_of_single_layers_become_one(keys: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """Older vLLM takes r and lora_alpha for every layer: what is written says the same to both."""
    folder = lora(base, tmp_path / "a", **keys)
    export.run(str(folder), "vllm", str(tmp_path / "out"), model=str(base))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    state = tensors(tmp_path / "out")
    assert {tensor.shape[0 if ".lora_A" in name or name.endswith("_A") else 1] for name, tensor in state.items()} == {
        config["r"]
    }
    load_plain = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)  # noqa: E731
    expected = logits(PeftModel.from_pretrained(load_plain(), folder))
    found = logits(PeftModel.from_pretrained(load_plain(), tmp_path / "out"))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_one_that_needs_no_change_is_not_changed(base: Path, tmp_path: Path) -> None:
    folder = lora(base, tmp_path / "a", r=5, use_rslora=True)
    done = ft("export", folder, "--for", "vllm", "-o", "out of it", "--model", base, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = tensors(folder), tensors(tmp_path / "out of it")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (
        f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules 'out-of-it={tmp_path}/out of it'"
        in done.stderr
    )
    card = (tmp_path / "out of it" / "README.md").read_text()
    assert f"vllm serve {base.name} --enable-lora --max-lora-rank 8 --lora-modules out-of-it=.\n" in card
    assert str(tmp_path) not in card
    again = ft("export", folder, "--for", "peft", "-o", "out of it", "--model", base, "--overwrite", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "from peft import PeftModel" in (tmp_path / "out of it" / "README.md").read_text()


def test_another_template_is_given_to_vllm(base: Path, tmp_path: Path) -> None:
    folder = lora(base, tmp_path / "a")
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    done = ft("export", folder, "--for", "vllm", "-o", tmp_path / "out", "--model", base)
    assert f"--chat-template {tmp_path}/out/chat_template.jinja" in done.stderr
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template


def test_nothing_is_overwritten(base: Path, tmp_path: Path) -> None:
    folder, mine = lora(base, tmp_path / "a"), tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    for target in (mine, folder, base, tmp_path, tmp_path / "a" / ".."):
        for extra in ([], ["--overwrite"]):
            done = ft("export", folder, "--for", "peft", "-o", target, "--model", base, *extra)
            assert done.returncode == 2
    assert [path.name for path in mine.iterdir()] == ["notes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "mine"]
    done = ft("export", folder, "--for", "sglang", "-o", tmp_path / "out", "--model", base)
    assert "--for: unknown consumer 'sglang' → one of peft, vllm, llama.cpp, ollama" in done.stderr


# --- GGUF files ---

TWICE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ 'assistant: ' }}"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a GGUF file without a suffix, as Ollama names them, and an adapter of it), in a folder with a space."""
    pytest.importorskip("gguf")
    from finetune.models.gguf.export import write_model

    folder = tmp_path_factory.mktemp("my models")
    write_model(BUILTIN_MODELS / "tiny-llama", folder / "sha256-12", "f32")
    return folder / "sha256-12", lora(Path(sources.locate(config_of(folder / "sha256-12"))), folder / "a")


def pasted(line: str) -> list[str]:
    """A printed command as a shell takes it apart."""
    return shlex.split(line.strip())


def test_an_adapter_for_llama_cpp_on_its_gguf_base(gguf: tuple[Path, Path], tmp_path: Path) -> None:
    """The line that is printed can be pasted, and llama.cpp computes with its files what peft does."""
    base, folder = gguf
    done = ft("export", folder, "--for", "llama.cpp", "-o", "the out", "--model", base, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = next(pasted(line) for line in done.stderr.splitlines() if line.startswith("llama-cli"))
    file = tmp_path / "the out" / "adapter.gguf"
    assert line == ["llama-cli", "--model", str(base), "--lora", str(file), "--jinja"]
    assert {path.name for path in file.parent.iterdir()} == {"adapter.gguf", "export.json", "README.md"}
    card = (file.parent / "README.md").read_text()
    assert "llama-cli --model BASE.gguf --lora adapter.gguf --jinja\n" in card
    assert str(tmp_path) not in card
    llama_cpp = pytest.importorskip("llama_cpp")
    options: dict[str, Any] = {"n_ctx": 64, "n_threads": 1, "logits_all": True, "type_k": 0, "type_v": 0}
    other = llama_cpp.Llama(str(base), lora_path=str(file), verbose=False, **options)
    other.eval(IDS)
    plain = AutoModelForCausalLM.from_pretrained(sources.locate(config_of(base)), dtype=torch.float32)
    alone = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, folder))
    torch.testing.assert_close(torch.tensor(other.scores[: len(IDS)])[None], expected, atol=5e-3, rtol=1e-3)
    assert (expected - alone).abs().max() > 0.1


def test_an_adapter_for_ollama_asks_as_it_was_trained(gguf: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = gguf
    own = tmp_path / "own template"
    shutil.copytree(folder, own)
    (own / "chat_template.jinja").write_text(TWICE)
    done = ft("export", own, "--for", "ollama", "-o", "The out", "--model", base, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "The out"
    assert pasted(done.stderr.splitlines()[-1]) == ["ollama", "create", "the-out", "-f", str(out / "Modelfile")]
    made = (out / "Modelfile").read_text()
    assert f"\nFROM {base}\nADAPTER ./adapter.gguf\n" in made
    assert "user: " in made.partition("TEMPLATE")[2]
    assert "PARAMETER stop" in made
    done = ft("export", own, "--for", "llama.cpp", "-o", "out2", "--model", base, cwd=tmp_path)
    assert pasted(done.stderr.splitlines()[-1])[-2:] == [
        "--chat-template-file",
        str(tmp_path / "out2/chat_template.jinja"),
    ]
    assert (tmp_path / "out2" / "chat_template.jinja").read_text() == TWICE
    (own / "chat_template.jinja").write_text("{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}")
    done = ft("export", own, "--for", "ollama", "-o", "out3", "--model", base, cwd=tmp_path)
    assert done.returncode == 2
    assert "Go templates cannot write" in done.stderr
    assert not list(tmp_path.glob("out3*"))


def test_a_base_that_is_no_gguf_file(base: Path, tmp_path: Path) -> None:
    folder = lora(base, tmp_path / "a")
    with pytest.raises(UserError, match=r"Ollama puts an adapter on a GGUF base, and its base is none"):
        export.run(str(folder), "ollama", str(tmp_path / "out"), model=str(base))
    done = ft("export", folder, "--for", "llama.cpp", "-o", tmp_path / "out", "--model", base)
    assert f"its base as a GGUF file: ft merge --model {base} --format gguf --output BASE.gguf\n" in done.stderr


def test_vllm_gets_the_folder_of_a_gguf_base(gguf: tuple[Path, Path], tmp_path: Path) -> None:
    """Also of one in a repository, whose name is no folder; the card names no folder of this machine."""
    base, folder = gguf
    done = ft("export", folder, "--for", "vllm", "-o", tmp_path / "out", "--model", base)
    assert f"vllm serve {sources.locate(config_of(base))} " in done.stderr
    assert "vllm serve BASE " in (tmp_path / "out" / "README.md").read_text()


# --- what is otherwise there than where the adapter was trained ---


def test_scaled_positions_are_not_left_out(base: Path, tmp_path: Path) -> None:
    folder = lora(base, tmp_path / "a")
    (folder / "base_identity.json").write_text(json.dumps({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}))
    for name in ("peft", "vllm", "llama.cpp"):
        with pytest.raises(UserError, match=r"was trained with model.rope_scaling \(linear\).* → merge it"):
            export.run(str(folder), name, str(tmp_path / "out"), model=str(base))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["peft", "vllm", "llama.cpp"])
def test_thinking_and_quantization_are_told(name: str, base: Path, tmp_path: Path) -> None:
    folder = lora(base, tmp_path / "a")
    shutil.copyfile(resource_path("data_templates", "chat_templates", "qwen3.jinja"), folder / "chat_template.jinja")
    told = {"data.thinking": "empty", "rows_with": 0, "rows_without": 1, "shown": ["off"]}
    (folder / "thinking.json").write_text(json.dumps(told))
    (folder / "base_identity.json").write_text(json.dumps({"quantization": "int4"}))
    done = ft("export", folder, "--for", name, "-o", tmp_path / "out", "--model", base)
    assert done.returncode == 0, done.stderr
    assert "thinking is on, and training only showed it off" in done.stderr
    assert "ask with enable_thinking: false\n" in done.stderr
    assert "it was trained on int4 weights" in done.stderr


# --- vLLM's own code, where its sources are: `pip download vllm --no-deps`, unpacked on the path, is enough ---

VLLM = importlib.util.find_spec("vllm")
WITH_VLLM = pytest.mark.skipif(VLLM is None, reason="needs vLLM, or its sources on the path")


def sources_of_vllm() -> Path:
    assert VLLM is not None
    return Path(str(VLLM.origin)).parent


def of_vllm(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """(PEFTHelper, LoRAModel) out of its own files, which run as they are; what they import beside is stood in for."""
    folder = sources_of_vllm()

    def stand_in(name: str, **values: Any) -> ModuleType:
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    def real(name: str) -> Any:
        path = folder.joinpath(*name.split(".")[1:]).with_suffix(".py")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    class Quiet:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None

    import re

    for name in ("vllm", "vllm.config", "vllm.lora", "vllm.model_executor", "vllm.model_executor.models", "vllm.utils"):
        stand_in(name)
    stand_in("vllm.logger", init_logger=lambda _: Quiet())
    stand_in("vllm.config.lora", LoRAConfig=object)
    stand_in("vllm.model_executor.models.utils", WeightsMapper=object)
    stand_in("vllm.utils.torch_utils", PIN_MEMORY=False)
    if importlib.util.find_spec("regex") is None:
        monkeypatch.setitem(sys.modules, "regex", re)
    names: dict[str, Any] = {"get_lora_id": lambda: 1}
    wanted = ("parse_fine_tuned_lora_name", "is_base_embedding_weights")
    tree = ast.parse((folder / "lora" / "utils.py").read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    exec(compile(ast.Module(found, []), "utils.py", "exec"), names)
    stand_in("vllm.lora.utils", **names)
    helper = real("vllm.lora.peft_helper")
    real("vllm.lora.lora_weights")
    return helper.PEFTHelper, real("vllm.lora.lora_model").LoRAModel


@dataclass
class Settings:
    max_lora_rank: int


@WITH_VLLM
@pytest.mark.parametrize("keys", [{}, {"use_rslora": True}, *PATTERNS.values()], ids=["plain", "rsLoRA", *PATTERNS])
def test_vllm_reads_what_was_exported_for_it(
    keys: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config is legal at the size that is printed, and B A times vLLM's scale is what peft computes."""
    folder = lora(base, tmp_path / "a", **keys)
    done = ft("export", folder, "--for", "vllm", "-o", tmp_path / "out", "--model", base)
    size = int(done.stderr.partition("--max-lora-rank ")[2].split()[0])
    helper_class, model_class = of_vllm(monkeypatch)
    helper = helper_class.from_local_dir(str(tmp_path / "out"), 512)
    helper.validate_legal(Settings(size))
    modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}
    read = model_class.from_local_checkpoint(
        str(tmp_path / "out"), modules, helper, device="cpu", dtype=torch.float32, model_vocab_size=259
    )
    state = tensors(folder)
    expected = uniform.deltas(json.loads((folder / "adapter_config.json").read_text()), state)
    assert read.loras.keys() == expected.keys()
    for name, (b, a) in expected.items():
        layer = read.loras[name].optimize()
        torch.testing.assert_close(layer.lora_b.double() @ layer.lora_a.double(), b @ a, atol=1e-6, rtol=1e-5)


@WITH_VLLM
@pytest.mark.parametrize("keys", [keys for keys, _ in LIMITS.values()], ids=LIMITS)
def test_vllm_refuses_what_is_refused_for_it(
    keys: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lora(base, tmp_path / "a", **keys)
    helper_class, model_class = of_vllm(monkeypatch)

    def read() -> None:
        helper = helper_class.from_local_dir(str(folder), 512)
        helper.validate_legal(Settings(consumers.VLLM_RANKS[-1]))
        model_class.from_local_checkpoint(str(folder), {"q_proj", "down_proj"}, helper, device="cpu")

    with pytest.raises(ValueError, match=r"support|rank|bias"):
        read()


@WITH_VLLM
def test_our_sizes_are_vllm_s() -> None:
    tree = ast.parse((sources_of_vllm() / "config" / "lora.py").read_text())
    said = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}  # type: ignore[attr-defined]
    values = said["MaxLoRARanks"].slice.elts  # type: ignore[attr-defined]
    assert tuple(value.value for value in values) == consumers.VLLM_RANKS
