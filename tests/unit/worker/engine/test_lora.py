"""Adapters on a shared base: equal to their merged weights, alone and in one batch with others; and who is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from services.worker.engine import Delta, Engine, EngineConfig, EngineRefusal, ModelRefusal, Sampling
from services.worker.engine.batching import SequenceView, plan_step
from services.worker.engine.images.convert import convert
from services.worker.engine.images.model_image import image_key
from services.worker.engine.lora import read_adapter
from services.worker.engine.lora_config import lora_config
from services.worker.engine.native.build import load_library
from services.worker.engine.spec import DecoderSpec, read_configs, spec_from_config
from tests.unit.worker.engine.adapters import (
    RANK,
    adapter_config,
    adapter_tensors,
    merged,
    save_adapter,
    scale_of,
)
from tests.unit.worker.engine.builders import (
    VOCAB_SIZE,
    Answer,
    make_engine,
    make_request,
    oracle_greedy,
    run_all,
    save_model,
    tiny_config,
)
from tests.unit.worker.engine.conftest import TinyModel
from tests.unit.worker.engine.family_configs import VARIANTS

DEMO = Path(__file__).parents[4] / "infra" / "demo" / "adapters"
LLAMA_TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
ANSWER_TOKENS = 10
SCORED = Sampling(temperature=0.0, logprobs=2)

# What each type calls its linear layers.
TARGETS: dict[str, tuple[str, ...]] = {
    "llama, as many key heads as heads": ("k_proj", "up_proj"),
    "qwen3": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gptj": ("q_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
    "codegen": ("qkv_proj", "out_proj"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "opt": ("q_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "bloom": ("query_key_value", "dense_h_to_4h"),
}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
    return tokens


def answers_of(engine: Engine, models: Sequence[str], prompt: list[int], **changes: Any) -> dict[str, Answer]:
    """One request for each model, all at once."""
    return run_all(
        engine,
        [
            make_request(f"{model} {number}", prompt, ANSWER_TOKENS, model=model, **changes)
            for number, model in enumerate(models)
        ],
    )


@dataclass(frozen=True)
class Adapters:
    """Two adapters of the tiny model, in other places and of other ranks; and its merged modules."""

    folders: dict[str, Path]
    oracles: dict[str, Any]

    def load(self, engine: Engine) -> None:
        for name, folder in self.folders.items():
            engine.load_adapter(name, "m", folder)


@pytest.fixture(scope="module")
def adapters(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    folders, oracles = {}, {"m": tiny.oracle}
    wishes: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "wide": (LLAMA_TARGETS, {}),
        "narrow": (("q_proj", "v_proj"), {"r": 2, "use_rslora": True}),
    }
    for seed, (name, (targets, changes)) in enumerate(wishes.items()):
        config = adapter_config(targets, **changes)
        tensors = adapter_tensors(tiny.oracle, targets, seed, config["r"])
        folders[name] = save_adapter(tmp_path_factory.mktemp(name), tensors, config)
        oracles[name] = merged(tiny.oracle, tensors, scale_of(config))
    return Adapters(folders, oracles)


@pytest.mark.parametrize("variant", TARGETS)
def test_greedy_equals_transformers_with_merged_weights(variant: str, tmp_path: Path, kernels: str) -> None:
    config: PretrainedConfig = VARIANTS[variant]
    oracle = save_model(tmp_path / "base", config, scale=25.0 if variant == "bloom" else 12.0)
    engine = make_engine(tmp_path / "base", kernels=kernels)
    # Each kind of product by itself as well: one that were left out would not show beside the others.
    changed = 0
    for number, targets in enumerate([TARGETS[variant], *((target,) for target in TARGETS[variant])]):
        # PEFT sets the flag where weights are stored the other way round; A and B are as ever.
        settings = adapter_config(targets, fan_in_fan_out=variant == "gpt2")
        tensors = adapter_tensors(oracle, targets, seed=number)
        engine.load_adapter(f"a{number}", "m", save_adapter(tmp_path / f"a{number}", tensors, settings))
        twin = merged(oracle, tensors, scale_of(settings))
        for length in (5, 40):
            prompt = prompt_of(length, seed=length)
            answer = answers_of(engine, [f"a{number}"], prompt)[f"a{number} 0"]
            assert answer.tokens == oracle_greedy(twin, prompt, ANSWER_TOKENS), targets
            changed += answer.tokens != oracle_greedy(oracle, prompt, ANSWER_TOKENS)
    assert changed > len(TARGETS[variant])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_adapters_and_base_in_one_batch_answer_as_alone(
    tiny: TinyModel, adapters: Adapters, precision: str, kernels: str
) -> None:
    """To the bit, in any company: the same rows are added to whoever else is there."""
    prompts = [prompt_of(length, seed=length) for length in (1, 17, 40)]

    def engine() -> Engine:
        made = make_engine(tiny.folder, precision=precision, kernels=kernels)
        adapters.load(made)
        return made

    alone = {
        (model, number): answers_of(engine(), [model], prompt, sampling=SCORED)[f"{model} 0"]
        for model in adapters.oracles
        for number, prompt in enumerate(prompts)
    }
    together = run_all(
        engine(),
        [
            make_request(f"{model} {number}", prompt, ANSWER_TOKENS, model=model, sampling=SCORED)
            for number, prompt in enumerate(prompts)
            for model in adapters.oracles
        ][:8],
    )
    assert len(together) == 8
    for (model, number), answer in alone.items():
        if f"{model} {number}" in together:
            assert together[f"{model} {number}"] == answer
        if precision == "fp32":
            assert answer.tokens == oracle_greedy(adapters.oracles[model], prompts[number], ANSWER_TOKENS)
    assert len({tuple(alone[model, 1].tokens) for model in adapters.oracles}) == 3


def test_adapters_stay_theirs_through_chunks_and_pre_emption(
    tiny: TinyModel, adapters: Adapters, kernels: str
) -> None:
    engine = make_engine(tiny.folder, prefill_chunk_tokens=23, kv_tokens=256, kernels=kernels)
    adapters.load(engine)
    prompts = [prompt_of(length, seed=length) for length in (30, 45, 60)]
    answers = run_all(
        engine,
        [
            make_request(f"{model} {number}", prompt, 40, model=model)
            for number, prompt in enumerate(prompts)
            for model in adapters.oracles
        ],
    )
    for number, prompt in enumerate(prompts):
        for model, oracle in adapters.oracles.items():
            assert answers[f"{model} {number}"].tokens == oracle_greedy(oracle, prompt, 40)


def test_lower_precisions_stay_close_to_merged_weights(
    tiny: TinyModel, adapters: Adapters, kernels: str
) -> None:
    prompt = prompt_of(40)
    with torch.inference_mode():
        expected = torch.log_softmax(adapters.oracles["wide"](torch.tensor([prompt])).logits[0, :-1], dim=-1)
    scores = expected.gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
    for precision in ("bf16", "int8"):
        engine = make_engine(tiny.folder, precision=precision, kernels=kernels)
        adapters.load(engine)
        answer = answers_of(engine, ["wide"], prompt, sampling=SCORED, echo_logprobs=True)["wide 0"]
        ours = torch.tensor([score.logprob for score in answer.prompt_logprobs])
        assert (ours - scores).abs().mean() < 0.25
        engine = make_engine(tiny.folder, precision=precision, kernels=kernels)
        base = answers_of(engine, ["m"], prompt, sampling=SCORED, echo_logprobs=True)["m 0"]
        others = torch.tensor([score.logprob for score in base.prompt_logprobs])
        assert (others - scores).abs().mean() > 1.0


def test_one_prompt_is_computed_for_each_adapter_and_found_again_for_each(
    tiny: TinyModel, adapters: Adapters
) -> None:
    engine = make_engine(tiny.folder)
    adapters.load(engine)
    prompt = prompt_of(64)
    expected = {
        model: oracle_greedy(oracle, prompt, ANSWER_TOKENS) for model, oracle in adapters.oracles.items()
    }
    for _ in range(2):
        for model in ("m", "wide", "narrow"):
            assert answers_of(engine, [model], prompt)[f"{model} 0"].tokens == expected[model]
    for model in ("m", "wide", "narrow"):
        engine.add(make_request("again", prompt, 1, model=model))
        (delta,) = [delta for _ in range(3) if engine.has_work for delta in engine.step().deltas]
        assert delta.cached_prompt_tokens == 48


def test_an_adapter_replaced_under_its_handle_answers_with_the_new_weights(
    tiny: TinyModel, adapters: Adapters
) -> None:
    """Also where a prefix of the old one's could be found."""
    engine = make_engine(tiny.folder)
    prompt = prompt_of(40)
    for name in ("wide", "narrow", "wide"):
        engine.load_adapter("a", "m", adapters.folders[name])
        answer = answers_of(engine, ["a"], prompt)["a 0"]
        assert answer.tokens == oracle_greedy(adapters.oracles[name], prompt, ANSWER_TOKENS)
        engine.unload_model("a")


def test_what_an_adapter_has_computed_is_found_when_it_and_its_base_are_back(
    tiny: TinyModel, adapters: Adapters
) -> None:
    def cached(handle: str) -> int:
        engine.add(make_request("s", prompt, 1, model=handle))
        return max(delta.cached_prompt_tokens for delta in drain(engine))

    engine, prompt = make_engine(tiny.folder), prompt_of(40)
    engine.load_adapter("a", "m", adapters.folders["wide"])
    assert cached("a") == 0
    for handle in ("a", "m"):
        engine.unload_model(handle, keep_prefixes=True)
    engine.load_model("m", tiny.folder)
    assert cached("m") == 0, "the base alone is another model"
    engine.load_adapter("a", "m", adapters.folders["wide"])
    assert cached("a") == 32


def drain(engine: Engine) -> list[Delta]:
    deltas = []
    while engine.has_work:
        deltas += engine.step().deltas
    return deltas


def test_handles_are_taken_and_given_back_in_order(tiny: TinyModel, adapters: Adapters) -> None:
    engine = make_engine(tiny.folder)
    folder = adapters.folders["wide"]
    with pytest.raises(ValueError, match="model other is not loaded"):
        engine.load_adapter("a", "other", folder)
    info = engine.load_adapter("a", "m", folder)
    assert info.handle == "a" and 0 < info.weight_bytes < 1_000_000
    with pytest.raises(ValueError, match="loaded already"):
        engine.load_adapter("a", "m", folder)
    with pytest.raises(ValueError, match="loaded already"):
        engine.load_adapter("m", "m", folder)
    with pytest.raises(ModelRefusal, match="an adapter itself"):
        engine.load_adapter("b", "a", folder)
    with pytest.raises(ValueError, match="has adapters: a"):
        engine.unload_model("m")
    engine.add(make_request("s", prompt_of(5), model="a"))
    with pytest.raises(ValueError, match="has 1 sequences"):
        engine.unload_model("a")
    assert run_all(engine)["s"].finish_reason is not None
    engine.unload_model("a")
    with pytest.raises(EngineRefusal, match="a is not loaded"):
        engine.add(make_request("t", prompt_of(5), model="a"))
    engine.unload_model("m")


def test_sequences_of_one_base_share_a_pass() -> None:
    views = [
        SequenceView(f"s{number}", model, base, number, 4, 20, 8, computed)
        for number, (model, base, computed) in enumerate(
            [("a", "m", 7), ("m", "m", 7), ("b", "m", 0), ("c", "n", 7)]
        )
    ]
    batches = plan_step(views, 16, 64, 0, {}).batches
    assert [(batch.model, batch.decode, len(batch.chunks)) for batch in batches] == [
        ("m", ("s0", "s1"), 1),
        ("n", ("s3",), 0),
    ]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_dora": True}, "use_dora"),
        ({"use_qalora": True}, "use_qalora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"an_option_of_tomorrow": 1}, "an_option_of_tomorrow"),
        ({"r": 0}, "r must be"),
        ({"r": True}, "r must be"),
        ({"r": "8"}, "r must be"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
    ],
)
def test_a_config_that_means_other_arithmetic_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelRefusal, match=f"adapter_config.json: .*{problem}"):
        lora_config(adapter_config(["q_proj"], **changes))


def test_scale_and_targets_are_read_as_peft_means_them() -> None:
    plain = lora_config(adapter_config(["q_proj"], r=16, lora_alpha=8))
    assert plain.scale == 0.5
    assert plain.targets("model.layers.0.self_attn.q_proj") and not plain.targets("model.layers.0.xq_proj")
    assert lora_config(adapter_config(["q_proj"], r=16, lora_alpha=8, use_rslora=True)).scale == 2.0
    # A pattern that would take longer than the universe lasts is not run.
    assert lora_config(adapter_config("(a|a)*(b|b)*$")).targets("a" * 60)


def spoil(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    first = next(name for name in tensors if name.endswith("lora_A.weight"))
    second = first.replace("lora_A", "lora_B")
    if how == "rank":
        tensors[first] = tensors[first][:2].clone()
    elif how == "inputs":
        tensors[first] = tensors[first][:, 1:].clone()
    elif how == "outputs":
        tensors[second] = tensors[second][1:].clone()
    elif how == "integers":
        tensors[first] = tensors[first].to(torch.int32)
    elif how == "no B":
        del tensors[second]
    elif how == "no A":
        del tensors[first]
    elif how == "head":
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(RANK, 48)
        tensors["base_model.model.lm_head.lora_B.weight"] = torch.zeros(VOCAB_SIZE, RANK)
    elif how == "layer":
        for name in (first, second):
            tensors[name.replace("layers.0.", "layers.3.")] = tensors[name].clone()
    elif how == "foreign":
        tensors = {name.replace("self_attn", "attention"): tensor for name, tensor in tensors.items()}
    return tensors


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("rank", "has shape"),
        ("inputs", "has shape"),
        ("outputs", "has shape"),
        ("integers", "not floating point"),
        ("no B", "lora_B.weight is missing"),
        ("no A", "lora_A.weight is missing"),
        ("head", "adapt nothing that can be adapted here, such as base_model.model.lm_head"),
        ("layer", "adapt nothing that can be adapted here, such as .*layers.3"),
        ("foreign", "adapt nothing that can be adapted here"),
        ("another target", "target_modules do not name"),
        ("no file", "adapter_model.safetensors"),
        ("no config", "adapter_config.json"),
        ("not safetensors", "adapter_model.safetensors"),
    ],
)
def test_files_that_do_not_fit_their_base_are_refused_and_nothing_is_kept(
    tiny: TinyModel, tmp_path: Path, how: str, problem: str
) -> None:
    targets = ["v_proj"] if how == "another target" else ["q_proj"]
    tensors = spoil(adapter_tensors(tiny.oracle, ["q_proj"], seed=1), how)
    folder = save_adapter(tmp_path, tensors, adapter_config(targets))
    if how == "no file":
        # Weights in pickle's format are not looked at.
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    if how == "no config":
        (folder / "adapter_config.json").unlink()
    if how == "not safetensors":
        (folder / "adapter_model.safetensors").write_bytes(b"\x80\x02}q\x00.")
    engine = make_engine(tiny.folder)
    with pytest.raises(ModelRefusal, match=problem):
        engine.load_adapter("a", "m", folder)
    with pytest.raises(EngineRefusal, match="not loaded"):
        engine.add(make_request("s", [3], model="a"))
    engine.load_adapter(
        "a",
        "m",
        save_adapter(
            tmp_path / "sound",
            adapter_tensors(tiny.oracle, ["q_proj"], seed=1),
            adapter_config(["q_proj"]),
        ),
    )


def test_an_adapter_trained_on_the_bare_base_model_is_found(tiny: TinyModel, tmp_path: Path) -> None:
    """Without a head, module names lack the model's prefix."""
    tensors = adapter_tensors(tiny.oracle, ["q_proj"], seed=1)
    bare = {name.replace(".model.model.", ".model."): tensor for name, tensor in tensors.items()}
    spec = spec_from_config(*read_configs(tiny.folder))
    settings = adapter_config(["q_proj"], task_type="FEATURE_EXTRACTION")
    ours = read_adapter(save_adapter(tmp_path / "bare", bare, settings), "a", spec)
    theirs = read_adapter(save_adapter(tmp_path / "headed", tensors, adapter_config(["q_proj"])), "a", spec)
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(one["qkv"].down, other["qkv"].down)
        assert torch.equal(one["qkv"].up, other["qkv"].up)


@pytest.mark.parametrize("name", ["formal", "pirate"])
def test_the_demos_adapters_are_read(name: str, tmp_path: Path) -> None:
    """SmolLM2-135M's shapes: 9 query heads and 3 key heads of 64."""
    config = tiny_config(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
    )
    config.save_pretrained(tmp_path)
    spec: DecoderSpec = spec_from_config(*read_configs(tmp_path))
    adapter = read_adapter(DEMO / name, name, spec)
    assert len(adapter.layers) == 30
    for layer in adapter.layers:
        assert set(layer) == {"qkv"}
        matrices = layer["qkv"]
        # Query and value have eight ranks each; the key between them has none.
        assert matrices.down.shape == (16, 576) and matrices.up.shape == (960, 16)
        assert not matrices.up[:576, 8:].any() and not matrices.up[576:768].any()
        assert not matrices.up[768:, :8].any()
        assert matrices.up[:576, :8].any() and matrices.up[768:, 8:].any()


@pytest.mark.skipif(load_library().library is None, reason="images are of the C kernels")
def test_adapters_answer_on_a_base_from_an_image_as_on_one_from_its_folder(
    tiny: TinyModel, adapters: Adapters, tmp_path: Path
) -> None:
    config = EngineConfig(precision="fp32", max_batch=8, max_context_tokens=256, kv_tokens=2048)
    key = image_key("content", config)
    convert(tiny.folder, tmp_path / "m.image", key, config)
    plain, mapped = Engine(config), Engine(config)
    plain.load_model("m", tiny.folder)
    mapped.load_image("m", tmp_path / "m.image", key, ask_canary=True)
    answers = []
    for engine in (plain, mapped):
        adapters.load(engine)
        found = answers_of(engine, ["m", "wide", "narrow"], prompt_of(9))
        answers.append({name: answer.tokens for name, answer in found.items()})
    assert answers[0] == answers[1]
    assert len({tuple(tokens) for tokens in answers[0].values()}) == 3
