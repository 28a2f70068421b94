"""Contract with TRL and transformers: each test names the seam that has moved when it fails."""

import inspect
import logging
import re
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, MambaModel, RecurrentGemmaModel, Trainer
from transformers.utils import logging as transformers_logging
from trl import BEMACallback, DPOTrainer, GRPOConfig, GRPOTrainer, RewardTrainer, SyncRefModelCallback
from trl.trainer import grpo_trainer, utils

from trl_ext import compat


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("_tokenize_prompts", ["self", "prompts"]),
        ("_generate", ["self", "prompts"]),
        ("_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_compute_loss", ["self", "model", "inputs"]),
        ("training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        ("create_model_card", ["self", "model_name", "dataset_name", "tags"]),
    ],
)
def test_hook_signature(name, expected):
    assert parameters(getattr(GRPOTrainer, name)) == expected, f"GRPOTrainer.{name} has moved"


def test_scoring_forward_starts_with_the_arguments_we_name():
    hook = parameters(GRPOTrainer._get_per_token_logps_and_entropies)
    assert hook[:5] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]
    assert "batch_size" in hook
    missing = set(compat.MULTIMODAL_KEYS) - set(hook)
    assert not missing, f"GRPOTrainer._get_per_token_logps_and_entropies no longer takes {missing}"
    unknown = set(hook[5:]) - set(compat.MULTIMODAL_KEYS) - {"batch_size", "compute_entropy", "compute_aux_loss"}
    assert not unknown, f"GRPOTrainer._get_per_token_logps_and_entropies now also takes {unknown}"


def test_the_loss_makes_one_pass_and_takes_advantages_per_token():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert source.count("self._get_per_token_logps_and_entropies(") == 1
    assert source.count('inputs["advantages"]') == 1 and "advantages.dim() == 1" in source


def test_the_kl_term_is_switched_by_beta():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert "if self.beta != 0.0:\n            per_token_loss = per_token_loss + self.beta * per_token_kl" in source


def test_weights_are_sent_to_engines_within_generate_only():
    """`sync_weights` is called in `_generate` and in what it calls."""
    callers = {
        name
        for name, function in inspect.getmembers(GRPOTrainer, inspect.isfunction)
        if "sync_weights()" in inspect.getsource(function)
    }
    assert callers == {"_generate", "_generate_single_turn"}


def test_first_outputs_are_token_ids():
    assert "prompt_ids, images, multimodal_fields = self._tokenize_prompts(prompts)" in inspect.getsource(
        GRPOTrainer._generate
    )
    assert "completion_ids, logprobs = self._generate_single_turn(" in inspect.getsource(GRPOTrainer._generate)


def test_rewards_are_gathered_with_nan_for_none():
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    assert "rewards_per_func = gather(rewards_per_func)\n        return rewards_per_func" in source
    assert "reward if reward is not None else torch.nan" in source


def test_images_leave_messages_that_are_written():
    text = {"role": "assistant", "content": "b"}
    seen = {"role": "user", "content": [{"type": "image", "image": object()}, {"type": "text", "text": "a"}]}
    stripped = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}
    assert compat.strip_images_from_messages([seen, text]) == [stripped, text]
    assert compat.strip_images_from_messages("a") == "a"


def test_the_rollout_batch():
    """Old log-probabilities are those the hook returned, by identity; the token count is that of all processes."""
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert "old_per_token_logps, _, _ = self._get_per_token_logps_and_entropies(" in source
    assert source.count("old_per_token_logps = ") == 1 and source.count("old_per_token_logps, _, _ = ") == 1
    assert 'output["old_per_token_logps"] = old_per_token_logps' in source
    assert "num_items_in_batch = self.accelerator.gather(loss_mask.sum()).sum()" in source
    assert 'mode = "train" if self.model.training else "eval"' in source
    assert '"completions/clipped_ratio"].append(' in inspect.getsource(GRPOTrainer._generate)


def test_the_scoring_forward_names_its_arguments():
    """The critic's hook reads them by name."""
    source = inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies)
    assert "outputs = model(**model_inputs, labels=labels, fused_lm_head=True)" in source


def test_the_cache_has_one_name_in_the_model_its_trunk_and_its_output(policy):
    """And is taken by it without a warning of what will go."""
    trunk = policy.base_model
    name = compat.cache_argument(policy)
    assert name == compat.cache_argument(trunk), f"{type(policy).__name__} and its trunk name the cache differently"
    ids = torch.tensor([[5, 6, 7, 8]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = trunk(input_ids=ids[:, :3], use_cache=True)
        second = policy(input_ids=ids[:, 3:], use_cache=True, **{name: first[name]})
    torch.testing.assert_close(second.logits[:, -1], policy(input_ids=ids).logits[:, -1])


def test_models_that_carry_states_say_so(policy):
    assert not compat.has_states(policy)
    assert compat.has_states(MambaModel) and compat.has_states_alone(MambaModel)
    assert compat.has_states(RecurrentGemmaModel) and not compat.has_states_alone(RecurrentGemmaModel)


def test_attributes_we_read():
    source = inspect.getsource(GRPOTrainer.__init__)
    for name in ("_tokenizer", "eos_token_ids", "_step", "_buffered_inputs", "reward_func_names", "reward_weights"):
        assert f"self.{name} = " in source, name
    assert "self.current_gradient_accumulation_steps = " in inspect.getsource(Trainer._run_epoch)


def test_each_class_of_environments_that_pays_has_a_reward():
    source = inspect.getsource(GRPOTrainer.__init__)
    for line in (
        "inspect.getmembers(type(instance), predicate=inspect.isfunction)",
        "self._environment_pool[name] = [instance]",
        "if has_reward and type(instance) not in env_reward_types:",
        "self.reward_func_names.append(env_type.__name__)",
    ):
        assert line in source, line


def test_random_states_are_loaded_wherever_an_epoch_is_resumed():
    assert inspect.getsource(Trainer._run_epoch).count("self._load_rng_state(resume_from_checkpoint)") == 2


def test_the_sampler_draws_from_a_generator_of_its_own():
    source = inspect.getsource(utils.RepeatSampler)
    assert "self.generator.manual_seed(seed)" in source and "generator=self.generator" in source


def test_rollout_buffer():
    source = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "self._step % generate_every == 0 or self._buffered_inputs is None" in source
    assert "self._buffered_inputs[self._step % self.args.steps_per_generation]" in source
    assert "self._step += 1" in inspect.getsource(GRPOTrainer.training_step)


def test_reused_rollouts_survive_shuffling_and_splitting():
    """The batch holds what we put into it: (B, T), (B,), 0-d and None."""
    batch = {
        "prompt_ids": torch.arange(4)[:, None],
        "returns": torch.arange(4)[:, None] * torch.ones(4, 3),
        "scores": torch.arange(4.0),
        "num_items_in_batch": torch.tensor(5),
        "advantages": None,
    }
    for part in utils.split_tensor_dict(utils.shuffle_sequence_dict(batch), 2):
        assert (part["returns"] == part["prompt_ids"]).all() and (part["scores"] == part["prompt_ids"][:, 0]).all()
        assert part["advantages"] is None and part["num_items_in_batch"] == 5


def test_what_model_cards_are_made_of():
    source = inspect.getsource(GRPOTrainer.create_model_card)
    for part in ("get_trackio_space_url()", "get_comet_experiment_url()", "wandb.run.url", "get_config_model_id("):
        assert part in source, part
    for trainer in (GRPOTrainer, RewardTrainer, DPOTrainer):
        assert "self.create_model_card(model_name=model_name)" in inspect.getsource(trainer._save_checkpoint)
        assert set(trainer._paper) <= {"title", "id", "citation"}
    assert "_template_file" in vars(RewardTrainer) and "self._tag_names" in source and "self._name" in source


def test_reference_needs_beta_at_construction():
    source = inspect.getsource(GRPOTrainer.__init__)
    assert set(re.findall(r"args\.beta\b[^\n]*", source)) == {"args.beta != 0.0:", "args.beta"}


def test_one_generation_is_refused_by_trl_and_let_through_by_us(tmp_path):
    common = {"output_dir": str(tmp_path), "report_to": "none", "bf16": False}
    with pytest.raises(ValueError, match="at least 2 generations"):
        GRPOConfig(num_generations=1, **common)
    assert GRPOConfig(num_generations=compat.OneGeneration(), **common).num_generations == 1


def test_logs_and_metrics():
    source = inspect.getsource(GRPOTrainer.__init__)
    assert 'self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}' in source
    for column in ('"advantages": deque(', '"extra": defaultdict(lambda: deque('):
        assert column in source


def test_fused_output_is_what_the_scoring_forward_returns():
    assert grpo_trainer.add_fused_lm_head is utils.add_fused_lm_head
    assert "return FusedCausalLMOutput(" in inspect.getsource(utils.add_fused_lm_head)
    assert 'backbone_attr = "base_model"' in inspect.getsource(utils.add_fused_lm_head)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_save", ["self", "output_dir", "state_dict"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_load_best_model", ["self"]),
        ("_save_rng_state", ["self", "output_dir"]),
        ("_load_rng_state", ["self", "checkpoint"]),
        ("_push_from_checkpoint", ["self", "checkpoint_folder"]),
        ("create_optimizer", ["self", "model"]),
        ("create_scheduler", ["self", "num_training_steps", "optimizer"]),
        ("_clip_grad_norm", ["self", "model"]),
        ("_get_grad_norm", ["self", "model", "grad_norm"]),
    ],
)
def test_transformers_hook_signature(name, expected):
    assert parameters(getattr(Trainer, name)) == expected, f"transformers.Trainer.{name} has moved"


def test_gradients_are_clipped_by_a_hook_that_asks_for_parameters_alone():
    assert "grad_norm = self._clip_grad_norm(model)" in inspect.getsource(Trainer)
    assert "grad_norm = self._get_grad_norm(model, grad_norm=grad_norm)" in inspect.getsource(Trainer)
    clipping = (Trainer._clip_grad_norm, Trainer._get_grad_norm, Trainer._mixed_mesh_grad_norm)
    for function in (*clipping, Trainer._has_mixed_mesh_grads):
        assert set(re.findall(r"\bmodel\.(\w+)", inspect.getsource(function))) <= {"parameters"}, function.__name__


@pytest.mark.parametrize(
    "name, expected",
    [
        ("init_hf_repo", ["self", "token", "private"]),
        ("push_to_hub", ["self", "commit_message", "blocking", "token", "revision", "private", "kwargs"]),
    ],
)
def test_hook_signature_of_pushing(name, expected):
    assert parameters(getattr(Trainer, name)) == expected, f"transformers.Trainer.{name} has moved"


def test_pushes_are_futures_with_what_is_tried_again():
    source = inspect.getsource(Trainer._push_from_checkpoint)
    assert "push_jobs = [model_push_job]" in source and "push_jobs.append(checkpoint_push)" in source
    assert "self.push_in_progress.jobs.extend(push_jobs)" in source
    assert 'ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"]' in source
    assert 'ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"]' in inspect.getsource(Trainer.push_to_hub)


def test_all_is_on_disk_when_a_push_waits_for_the_last_one():
    parts = inspect.getsource(Trainer.push_to_hub).split("self._finish_current_push()")
    assert len(parts) == 2 and "self.save_model(" in parts[0] and "self.create_model_card(" in parts[0]
    assert "upload_folder" not in parts[0] and "upload_folder" in parts[1]


def test_rng_state_is_saved_with_every_resumable_checkpoint():
    assert "self._save_rng_state(output_dir)" in inspect.getsource(Trainer._save_checkpoint)


def test_4bit_layers_ask_the_processor_once():
    """They ask when they are made, by the function that is replaced, and say whether they are packed."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    assert "self.support_avx512bf16_for_cpu = has_avx512bf16()" in inspect.getsource(modules.Linear4bit.__init__)
    forward = inspect.getsource(modules.Linear4bit.forward)
    assert "and self.support_avx512bf16_for_cpu\n" in forward and "_convert_weight_packed_for_cpu(" in forward
    assert '"packing_format_for_cpu"' in forward


# --- What the ranking trainers rely on ---


@pytest.mark.parametrize("trainer", [RewardTrainer, DPOTrainer])
@pytest.mark.parametrize(
    "name, expected",
    [
        ("_prepare_dataset", ["self", "dataset", "processing_class", "args", "dataset_name"]),
        ("_set_signature_columns_if_needed", ["self"]),
        ("compute_loss", ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
        ("log", ["self", "logs", "start_time"]),
    ],
)
def test_hook_signature_of_preference_trainers(trainer, name, expected):
    assert parameters(getattr(trainer, name)) == expected, f"{trainer.__name__}.{name} has moved"


@pytest.mark.parametrize("trainer", [GRPOTrainer, DPOTrainer])
def test_the_reference_of_an_adapter_is_made_of_the_default_one(trainer):
    source = inspect.getsource(trainer.__init__)
    assert 'model.peft_config["default"]' in source and 'model.add_adapter("ref", default_config)' in source
    assert "your model is already instantiated" in source


@pytest.mark.parametrize("trainer", [RewardTrainer, DPOTrainer])
def test_the_collator_is_not_used_before_the_trainer_is_made(trainer):
    source = inspect.getsource(trainer.__init__)
    assert "data_collator(" not in source, f"{trainer.__name__} now collates in its __init__"


@pytest.mark.parametrize(
    "function, expected",
    [
        (compat.tokenize, ["processing_class", "input", "apply_chat_template_kwargs"]),
        (compat.pad, ["tensors", "padding_value", "padding_side", "pad_to_multiple_of"]),
        (compat.use_adapter, ["model", "adapter_name"]),
        (compat.create_model_from_path, ["model_id", "architecture", "kwargs"]),
        (compat.global_then_local_main_first, []),
    ],
)
def test_signature_of_private_functions(function, expected):
    assert parameters(function) == expected, f"{function.__name__} has moved"


def test_a_config_says_which_attention_a_model_runs():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", num_hidden_layers=0, hidden_size=4, num_attention_heads=1, vocab_size=8),
        attn_implementation="eager",
    )
    assert compat.attention_of(model.config) == "eager"
    model.set_attn_implementation("sdpa")
    assert compat.attention_of(model.config) == "sdpa"


# --- Swaps ---


@pytest.mark.parametrize(
    "swap, name, value",
    [
        (lambda owner: compat.rewarded_by(owner, ["ours"]), "reward_funcs", ["ours"]),
        (compat.without_kl_in_loss, "beta", 0.0),
        (compat.without_masking_cut, "mask_truncated_completions", False),
        (compat.with_reference, "beta", 0.1),
    ],
)
def test_an_attribute_is_another_for_a_while(swap, name, value):
    owner = SimpleNamespace(beta=0, kl_in_reward=0.1, mask_truncated_completions=True, reward_funcs=["TRL's"])
    before = dict(vars(owner))
    with pytest.raises(KeyError), swap(owner):
        assert getattr(owner, name) == value
        raise KeyError
    assert vars(owner) == before


def test_trl_reads_the_attributes_that_are_swapped():
    for name in ("_calculate_rewards", "_generate_and_score_completions"):
        attribute = "reward_funcs" if name == "_calculate_rewards" else "mask_truncated_completions"
        assert f"self.{attribute}" in inspect.getsource(getattr(GRPOTrainer, name))
    assert ".generate(" in inspect.getsource(GRPOTrainer._generate_single_turn)


def test_generating_is_another_for_a_while(policy):
    with compat.generating_by(policy, lambda former, ids: (former.__name__, ids)):
        assert policy.generate(3) == ("generate", 3) and policy.generate.__name__ == "generate"
    assert "generate" not in vars(policy)
    policy.generate = lambda ids: ids + 1  # a user's
    with compat.generating_by(policy, lambda former, ids: 2 * former(ids)):
        assert policy.generate(3) == 8
    assert policy.generate(3) == 4


def test_one_scoring_pass_is_answered_and_others_are_made():
    trainer = SimpleNamespace(_get_per_token_logps_and_entropies=lambda ids: ("made", ids))
    with compat.first_scoring_by(trainer, lambda ids: ("answered", ids)):
        passes = [trainer._get_per_token_logps_and_entropies(ids) for ids in (1, 2)]
    assert passes == [("answered", 1), ("made", 2)] and trainer._get_per_token_logps_and_entropies(3) == ("made", 3)
    with pytest.raises(RuntimeError, match="no scoring pass"), compat.first_scoring_by(trainer, None):
        pass


def test_what_trains_keeps_its_precision_while_trl_casts_the_model(policy):
    assert "unwrapped_model.to(torch.bfloat16)" in inspect.getsource(GRPOTrainer._generate_single_turn)
    frozen, *trained = policy.parameters()
    frozen.requires_grad_(False)
    before = trained[0].detach().clone()
    with compat.trainables_kept(policy):
        policy.to(torch.bfloat16)
    assert torch.equal(trained[0], before) and frozen.dtype == torch.bfloat16


def test_callbacks_walk_the_parameters_of_two_models_when_we_think_they_do():
    for callback, event in compat.PARALLEL_WALKS.items():
        assert "model" in inspect.getsource(getattr(callback, event)), f"{callback.__name__}.{event}"
    assert "target_model.parameters(), model.parameters(), strict=True" in inspect.getsource(SyncRefModelCallback)
    assert "load_state_dict(model.state_dict())" in inspect.getsource(BEMACallback.on_train_begin)


def test_callbacks_walk_within_a_context_for_a_while():
    steps = []

    @contextmanager
    def context(model):
        steps.append("in")
        yield
        steps.append("out")

    class Callback(SyncRefModelCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            steps.append(model)

    callback = Callback(None, None)
    with compat.parallel_walks_within([callback], context):
        callback.on_step_end(None, None, None, model="model")
    callback.on_step_end(None, None, None, model="model")
    assert steps == ["in", "model", "out", "model"]


def test_trl_warns_by_the_logger_of_its_module():
    for trainer in (GRPOTrainer, DPOTrainer):
        assert "logger.warning(" in inspect.getsource(trainer.__init__)
        logger = logging.getLogger(trainer.__module__)
        with compat.without_loading_warnings(trainer):
            assert not logger.filter(
                logger.makeRecord("", 30, "", 0, "as your model is already instantiated.", (), None)
            )
            assert logger.filter(logger.makeRecord("", 30, "", 0, "another", (), None))
        assert not logger.filters


def test_transformers_is_quiet_for_a_while():
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with compat.without_loading_report():
        assert transformers_logging.get_verbosity() == logging.ERROR
        assert not transformers_logging.is_progress_bar_enabled()
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_an_adapters_name_and_what_trains_outlast_a_trainer(policy):
    """PEFT's ways to switch leave other weights to train than before; TRL looks for the adapter called `default`."""
    model = get_peft_model(policy, LoraConfig(target_modules=["q_proj"]), adapter_name="mine")
    weight = next(weight for weight in model.parameters() if weight.requires_grad)
    weight.requires_grad_(False)
    with compat.adapter_kept(model):
        assert model.peft_config["default"] is model.peft_config["mine"]
        model.set_adapter("mine")
        assert weight.requires_grad
    assert not weight.requires_grad and set(model.peft_config) == {"mine"}
