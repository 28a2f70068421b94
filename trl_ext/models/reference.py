"""
The reference of a policy that was given as a model and trains in full.

TRL loads the reference from where the policy came from. Changes of the policy in memory since then, a resized
vocabulary or an earlier training, are not on disk; they are copied here, so that the reference is the policy as given.
"""

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel

from .quantization import is_quantized


def take_up_start(reference: nn.Module | None, policy, is_sharded: bool) -> None:
    """
    Gives a reference the vocabulary and the weights of the policy, before either was trained.

    Args:
        reference (`torch.nn.Module`, *optional*): As the parent loaded it, wherever it was wrapped. None for none.
        policy: The model, or its name, that the user gave. From a name, or for a quantized model, nothing is copied.
        is_sharded (`bool`): True where FSDP or DeepSpeed holds the reference, whose weights then stay as they are.

    Raises:
        ValueError: for another vocabulary than the policy's, where the reference is sharded.
    """
    if reference is None or not isinstance(policy, PreTrainedModel) or is_quantized(policy):
        return
    reference = extract_model_from_parallel(reference)
    num_tokens, num_loaded = (model.config.get_text_config().vocab_size for model in (policy, reference))
    if is_sharded:
        if num_tokens != num_loaded:
            raise ValueError(
                f"`model` has a vocabulary of {num_tokens} tokens, and the reference, which is loaded from where `model` "
                f"came from and sharded, one of {num_loaded}. Save the model with `model.save_pretrained(path)` and its "
                "tokenizer beside it, and pass the path."
            )
        return
    num_rows = policy.get_input_embeddings().weight.size(0)
    if reference.get_input_embeddings().weight.size(0) != num_rows:
        reference.resize_token_embeddings(num_rows, mean_resizing=False)
    # A child of an earlier trainer's, a critic, is none of the reference's
    reference.load_state_dict(policy.state_dict(), strict=False)
