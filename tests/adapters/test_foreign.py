"""Adapters of other tools: each is loaded as peft itself does, or one line names why not before the base is loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import train
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from finetune.adapters import load, methods
from finetune.adapters.merge import check_layers
from finetune.commands import chat, evaluate, merge
from finetune.errors import UserError
from finetune.models import attach, loading, tokenizers
from finetune.recipe.adapters import ADAPTERS
from finetune.recipe.sections import ModelConfig

Recipe = Callable[..., Path]
IDS = torch.arange(40, 60)[None]


@pytest.fixture
def tied(base: Path, tmp_path: Path) -> Path:
    """The small Llama with its output head tied to the embeddings."""
    folder = tmp_path / "tied"
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(base, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def foreign(base: Path, folder: Path, tokens: int | None = None, config: Any = None, **keys: Any) -> torch.Tensor:
    """An adapter as plain peft makes and saves it, with its warnings; what it computes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _foreign(base, folder, tokens, config, **keys)


def _foreign(base: Path, folder: Path, tokens: int | None, config: Any, **keys: Any) -> torch.Tensor:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if tokens:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    lora = {"task_type": TaskType.CAUSAL_LM, "r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"], **keys}
    adapted = get_peft_model(model, config or LoraConfig(**lora))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(folder)
    return computed(adapted)


@torch.inference_mode()
def computed(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits


def config_of(base: Path) -> ModelConfig:
    return ModelConfig(name=str(base), sanity_check=False)


def ours(base: Path, folder: Path) -> torch.Tensor:
    model = config_of(base)
    attach.check_adapter(folder, model)
    return computed(attach.attach_adapter(loading.load_model(model, torch.float32), folder, model))


def merged(base: Path, folder: Path, output: Path) -> Any:
    """As plain transformers loads what `ft merge` writes."""
    merge.run(str(folder), str(output), model=str(base), dtype="float32")
    return AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)


TARGETS = [["q_proj", "embed_tokens"], ["q_proj", "lm_head"], ["embed_tokens"]]


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
def test_tied_embeddings_and_head_part_in_a_merge(tied: Path, tmp_path: Path, targets: list[str]) -> None:
    expected = foreign(tied, tmp_path / "a", target_modules=targets)
    model = merged(tied, tmp_path / "a", tmp_path / "merged")
    torch.testing.assert_close(computed(model), expected, atol=1e-5, rtol=0)
    assert model.config.tie_word_embeddings is False
    inside, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    before = AutoModelForCausalLM.from_pretrained(tied).get_input_embeddings().weight
    adapted, other = (inside, head) if "embed_tokens" in targets else (head, inside)
    assert torch.equal(other, before)
    assert not torch.equal(adapted, before)


def test_what_stays_tied_stays_tied(tied: Path, tmp_path: Path) -> None:
    expected = foreign(tied, tmp_path / "a")
    model = merged(tied, tmp_path / "a", tmp_path / "merged")
    torch.testing.assert_close(computed(model), expected, atol=1e-5, rtol=0)
    assert model.config.tie_word_embeddings is True
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")


def test_lora_on_tied_embeddings_trains_and_merges(recipe: Recipe, tied: Path, tmp_path: Path) -> None:
    run = train(recipe(model={"name": str(tied)}, adapter={"target_modules": ["q_proj", "embed_tokens"]}))
    pair = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32), run.adapter)
    expected = computed(pair)
    torch.testing.assert_close(computed(merged(tied, run.path, tmp_path / "merged")), expected, atol=1e-5, rtol=0)


KEYS: dict[str, dict[str, Any]] = {
    "bias lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "lora_bias on all": {"lora_bias": True, "target_modules": "all-linear"},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 99}},
    "layers": {"layers_to_transform": [1]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [5, 6, 7]}},
    "a copy of the embeddings": {"modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("kind", ["base", "tied"])
def test_loaded_and_merged_as_by_peft(
    keys: dict[str, Any], kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base: Path = request.getfixturevalue(kind)
    expected = foreign(base, tmp_path / "a", **keys)
    torch.testing.assert_close(ours(base, tmp_path / "a"), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(computed(merged(base, tmp_path / "a", tmp_path / "merged")), expected, atol=1e-5, rtol=0)


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def test_bin_weights(recipe: Recipe, base: Path, tmp_path: Path) -> None:
    expected = foreign(base, tmp_path / "a")
    as_bin(tmp_path / "a")
    assert torch.equal(ours(base, tmp_path / "a"), expected)


def other_methods() -> dict[str, Any]:
    from peft import HRAConfig, MissConfig, RandLoraConfig, VBLoRAConfig

    common = {"task_type": TaskType.CAUSAL_LM, "target_modules": ["q_proj", "v_proj"]}
    return {
        "hra": HRAConfig(r=2, **common), "miss": MissConfig(r=2, **common),
        "randlora": RandLoraConfig(r=4, **common),
        "vblora": VBLoRAConfig(r=2, num_vectors=8, vector_length=4, **common),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["hra", "miss", "randlora", "vblora"])
@pytest.mark.filterwarnings("ignore")  # of methods that nothing here makes
def test_methods_without_a_section(recipe: Recipe, base: Path, tmp_path: Path, kind: str) -> None:
    import yaml

    expected = foreign(base, tmp_path / "a", config=other_methods()[kind])
    torch.testing.assert_close(ours(base, tmp_path / "a"), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(computed(merged(base, tmp_path / "a", tmp_path / "merged")), expected, atol=1e-4, rtol=0)
    path = recipe(model={"adapter": str(tmp_path / "a")}, train={"max_steps": 1})
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if k != "adapter"}))
    run = train(path)
    assert yaml.safe_load((run.path / "recipe.yaml").read_text())["adapter"] == {
        "method": "other",
        "kind": kind.upper(),
    }
    assert json.loads((run.adapter / "adapter_config.json").read_text())["peft_type"] == kind.upper()


def with_tokens(base: Path, folder: Path, count: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<tok_{i}>" for i in range(count)], special_tokens=True)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["base", "tied"])
@pytest.mark.parametrize("saved", ["modules_to_save", "embeddings in the file", "single tokens"])
def test_added_tokens(
    recipe: Recipe, rows: Path, kind: str, saved: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The base gets as many embeddings, eval, chat and merge the tokens; training goes on and keeps them."""
    base: Path = request.getfixturevalue(kind)
    size = len(AutoTokenizer.from_pretrained(base))
    keys: dict[str, Any] = {
        "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "embeddings in the file": {},
        "single tokens": {"trainable_token_indices": {"embed_tokens": [size, size + 1, size + 2]}},
    }[saved]
    expected = foreign(base, tmp_path / "a", tokens=size + 3, **keys)
    with_tokens(base, tmp_path / "a", 3)
    found = ours(base, tmp_path / "a")
    compared = size if saved == "single tokens" else size + 3  # the head's new rows are nowhere then
    torch.testing.assert_close(found[..., :compared], expected[..., :compared], atol=1e-5, rtol=0)
    assert len(tokenizers.load_tokenizer(config_of(base), tmp_path / "a")) == size + 3
    model = merged(base, tmp_path / "a", tmp_path / "merged")
    torch.testing.assert_close(computed(model), found, atol=1e-5, rtol=0)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == model.config.vocab_size == size + 3
    if saved == "single tokens" and kind == "tied":
        return  # refused in training, see below
    run = train(
        recipe(
            model={"name": str(base), "adapter": str(tmp_path / "a")}, train={"max_steps": 1},
            adapter={"lora_alpha": 10, "target_modules": ["q_proj", "v_proj"]},
        )
    )  # fmt: skip
    assert len(AutoTokenizer.from_pretrained(run.adapter)) == size + 3
    assert ours(base, run.adapter).shape[-1] == size + 3


def test_fewer_embeddings_than_the_base(base: Path, tmp_path: Path) -> None:
    """Many tools cut a padded table to the tokenizer's size."""
    size = len(AutoTokenizer.from_pretrained(base))
    padded = AutoModelForCausalLM.from_pretrained(base)
    padded.resize_token_embeddings(size + 20, mean_resizing=False)
    padded.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "padded")
    expected = foreign(tmp_path / "padded", tmp_path / "a", tokens=size, modules_to_save=["embed_tokens", "lm_head"])
    torch.testing.assert_close(ours(tmp_path / "padded", tmp_path / "a"), expected, atol=1e-5, rtol=0)


# --- refused ---


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("the base was loaded"))


@pytest.mark.parametrize(
    "keys",
    [{"target_modules": ["lm_head"]}, {"trainable_token_indices": {"embed_tokens": [5]}}],
    ids=["head", "tokens"],
)
@pytest.mark.usefixtures("nothing_loads")
def test_no_training_on_a_wrapped_head(recipe: Recipe, tied: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    foreign(tied, tmp_path / "a", **keys)
    with pytest.raises(UserError, match=r"works on the output head .* → merge it first"):
        train(recipe(model={"name": str(tied), "adapter": str(tmp_path / "a")}))


def edited(**keys: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return edit


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def bin_of(content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        (folder / "adapter_model.bin").write_bytes(content)

    return write


def without_a_weight(folder: Path) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(state.items())[1:]), folder / "adapter_model.safetensors", {"format": "pt"})


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no JSON": (written("adapter_config.json", b'{"peft_type": '), "adapter_config.json: is not JSON"),
    "empty": (written("adapter_config.json", b""), "is not JSON"),
    "no text": (written("adapter_config.json", b"\xff\xfe\x00"), "is not JSON"),
    "a list": (written("adapter_config.json", b"[]"), "is JSON, but no mapping"),
    "a deep list": (written("adapter_config.json", b"[" * 100_000), "is not JSON"),
    "no type": (written("adapter_config.json", b"{}"), "peft_type: names no peft_type"),
    "unknown type": (edited(peft_type="WONDER"), "unknown peft_type 'WONDER'"),
    "type is a list": (edited(peft_type=["LORA"]), "unknown peft_type"),
    "rank is text": (edited(r="four"), r"a: .*"),
    "other targets": (edited(target_modules=["c_attn"]), "does not fit"),
    "more targets": (edited(target_modules=["q_proj", "v_proj", "o_proj"]), "lacks weights for"),
    "fewer targets": (edited(target_modules=["q_proj"]), "has more weights than"),
    "other rank": (edited(r=8), r"is \[4, 64\], .* wants \[8, 64\]"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "holds no adapter_model"),
    "cut off": (cut, "is cut off or no safetensors file"),
    "empty weights": (written("adapter_model.safetensors", b""), "is empty"),
    "a pointer": (written("adapter_model.safetensors", b"version https://git-lfs"), "is a Git LFS pointer"),
    "a weight less": (without_a_weight, "lacks weights for"),
    "an empty .bin": (bin_of(b""), "is empty"),
    "a cut .bin": (bin_of(b"PK\x03\x04 and no more"), "is cut off"),
    "no pickle": (bin_of(b"hello there"), "adapter_model.bin: "),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "expected"), BROKEN.values(), ids=BROKEN)
@pytest.mark.usefixtures("nothing_loads")
def test_one_line_before_the_base_is_loaded(
    recipe: Recipe, base: Path, rows: Path, tmp_path: Path, damage: Callable[[Path], Any], expected: str
) -> None:
    foreign(base, tmp_path / "a")
    damage(tmp_path / "a")
    adapter = str(tmp_path / "a")
    commands: list[Callable[[], Any]] = [
        lambda: train(recipe(model={"adapter": adapter}, adapter={"lora_alpha": 10, "target_modules": ["q_proj"]})),
        lambda: chat.run([adapter], model=str(base), max_new_tokens=1),
        lambda: merge.run(adapter, str(tmp_path / "merged"), model=str(base)),
        lambda: evaluate.run([], model=str(base), adapter=adapter, data=str(rows), limit=1),
    ]
    for command in commands:
        with pytest.raises(UserError, match=expected) as caught:
            command()
        assert len(caught.value.lines()) == 1
    assert not (tmp_path / "merged").exists()


def test_a_wider_adapter(base: Path, tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig

    wide = tmp_path / "wide"
    config = LlamaConfig.from_pretrained(base, hidden_size=96, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(wide)
    for name, kind in (("lora", None), ("prompt", PromptTuningConfig), ("prefix", PrefixTuningConfig)):
        given = None if kind is None else kind(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
        foreign(wide, tmp_path / name, config=given)
        with pytest.raises(UserError, match=r"wants"):
            attach.check_adapter(tmp_path / name, config_of(base))


def test_no_merge_where_there_is_no_place(base: Path, tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    qwen = tmp_path / "qwen"
    Qwen2ForCausalLM(Qwen2Config(vocab_size=300, num_hidden_layers=1, **sizes)).save_pretrained(qwen)
    AutoTokenizer.from_pretrained(base).save_pretrained(qwen)
    foreign(qwen, tmp_path / "a", lora_bias=True, target_modules=["o_proj"])
    fitted = attach.check_adapter(tmp_path / "a", config_of(qwen))
    with pytest.raises(UserError, match=r"has a bias \(lora_bias\) on .*o_proj, where qwen2 checkpoints have no place"):
        check_layers(fitted, tmp_path / "a")


SIZES: dict[str, dict[str, Any]] = {"vera": {"r": 8}, "oft": {"oft_block_size": 16}, "last_layers": {"num_layers": 1}}


@pytest.mark.parametrize("method", [name for name, row in methods.METHODS.items() if row.make_config])
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_every_method_of_ours_fits_its_base(base: Path, tmp_path: Path, method: str) -> None:
    """The look at names and shapes refuses nothing that was saved here, and the weights arrive."""
    model = config_of(base)
    network = loading.load_model(model, torch.float32)
    adapted = load.apply(network, ADAPTERS[method](**SIZES.get(method, {})), tokenizers.load_tokenizer(model))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    adapted.save_pretrained(tmp_path / "a")
    torch.testing.assert_close(ours(base, tmp_path / "a"), computed(adapted), atol=1e-5, rtol=0)
