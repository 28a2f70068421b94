"""Only a GPU can show these: compiled FlexAttention, bfloat16 under autocast, and the kernels of 4-bit layers."""

import pytest
import torch
from helpers import count_good, scripted_rollout, settings, tiny_settings
from peft import LoraConfig
from transformers import BitsAndBytesConfig, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from trl_ext import PPOConfig, PPOTrainer
from trl_ext.models.decoding import decode, settings_of
from trl_ext.packing.layout import packed_layout, rows_layout


DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")


def build(tokenizer, attn_implementation="sdpa"):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}  # kernels need heads of 16 or more
    config = Qwen3Config(**tiny_settings(tokenizer) | sizes, initializer_range=0.2)
    config._attn_implementation = attn_implementation
    return Qwen3ForCausalLM(config).to(DEVICE)


@pytest.fixture(scope="module")
def path(tokenizer, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("policy"))
    build(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def on_gpu(folder, **overrides):
    own = {"use_cpu": DEVICE == "cpu", "num_generations": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
    return settings(folder) | own | overrides


def batch():
    """Three prompts with two completions each, in TRL's layout, of 5 columns."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 20, (6, 40), generator=draw)
    mask = torch.ones_like(ids)
    for group, length in enumerate((35, 30, 7)):
        rows = slice(2 * group, 2 * group + 2)
        ids[rows, :35] = ids[2 * group, :35]
        mask[rows, : 35 - length] = 0
    mask[1, 38:] = mask[4, 36:] = 0
    return ids.to(DEVICE), mask.to(DEVICE)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "flex_attention"])
def test_packed_prompts_give_the_states_and_gradients_of_rows(tokenizer, attn_implementation, dtype, tolerance):
    torch.backends.cuda.matmul.allow_tf32 = False
    found = []
    for way, implementation in ((rows_layout, "sdpa"), (packed_layout, attn_implementation)):
        model = build(tokenizer, implementation).to(dtype)
        layout = way(*batch(), num_states=6)
        states = layout.states(model.model(**layout.inputs_of(model), use_cache=False).last_hidden_state)
        states = states[layout.mask].float()
        weights = torch.linspace(-1, 1, states.numel(), device=DEVICE).view_as(states)
        (states * weights).sum().backward()
        found.append([states, *(p.grad.float() for p in model.model.parameters())])
    for expected, actual in zip(*found, strict=True):
        assert (actual - expected).norm() <= tolerance * expected.norm()


def test_greedy_completions_are_those_of_generate(tokenizer):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = build(tokenizer).eval()
    ids, mask = (tensor[:, :35] for tensor in batch())
    own = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": [5, 9]}
    config = GenerationConfig(**own)
    expected = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    with torch.no_grad():
        actual = decode(model, ids, mask, settings_of(model, config))
    assert torch.equal(actual[:, : expected.size(1)], expected)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "flex_attention"])
def test_a_training_in_bfloat16_shares_prompts(path, prompts, tmp_path, attn_implementation):
    args = PPOConfig(
        **on_gpu(tmp_path, bf16=True, shared_prefix="always", num_iterations=2, gradient_accumulation_steps=2),
        model_init_kwargs={"attn_implementation": attn_implementation},
    )
    trainer = PPOTrainer(path, count_good, args, prompts)
    trainer.train()
    assert trainer.compact.prefix_check.verdict is True
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_adapters_on_a_4bit_base_train_in_float32(path, prompts, tmp_path, critic):
    """At a learning rate whose steps bfloat16 would round away, and with equal gradients after an evaluation."""
    pytest.importorskip("bitsandbytes")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    args = PPOConfig(
        **on_gpu(tmp_path, bf16=True, critic=critic, learning_rate=1e-6, critic_learning_rate=1e-6, max_steps=4)
    )
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = PPOTrainer(
        path,
        count_good,
        args,
        prompts,
        eval_dataset=prompts,
        rollout_func=scripted_rollout,
        peft_config=lora,
        quantization_config=nf4,
    )
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in trained.items()}

    def gradients():
        trainer.model.zero_grad()
        ids, mask = batch()
        with torch.autocast(DEVICE, torch.bfloat16):
            trainer.model(input_ids=ids, attention_mask=mask).logits.float().square().mean().backward()
        return [p.grad.clone() for name, p in trained.items() if "lora" in name and p.grad is not None]

    at_first = gradients()
    trainer.evaluate()
    trainer.model.train()
    for expected, actual in zip(at_first, gradients(), strict=True):
        torch.testing.assert_close(actual, expected)
    trainer.model.zero_grad()
    trainer.train()
    policy = [name for name in trained if "lora" in name and "critic" not in name]  # the critic's starts at V = 0
    moved = [(trained[name].detach() != before[name]).float().mean().item() for name in policy]
    assert len(moved) == 2 * 7 * 2 and min(moved) > 0.9
