"""
Public datasets of judged completions, as datasets of the `ranking` type.

| function | judgement | better is |
| --- | --- | --- |
| [`from_qa_feedback`] | six times 0, 1 or 2 | 1: the first, 2: the second |
| [`from_ultrafeedback`] | `fine-grained_score` or `overall_score` | higher |
| [`from_oasst1`], [`from_nectar`] | `rank` | lower |
| [`from_helpsteer2`] | `helpfulness` or another rating | higher |
| [`from_helpsteer2_preference`], [`from_helpsteer3`] | -3 to 3 | negative: the first, positive: the second |
| [`from_chatbot_arena`], [`from_arena_55k`] | a winner or a tie | the one named |
| [`from_webgpt`] | `score_0`, `score_1` | higher |

Each takes a [`~datasets.Dataset`] as its publishers made it and returns one as [`~trl_ext.data.convert`] says.
"""

import itertools
from typing import Any

from datasets import Dataset, Features, List, Value

from .readers import (
    Reader,
    arena_55k_messages,
    by_place,
    by_score,
    by_strength,
    column,
    columns,
    each,
    messages,
    nectar_prompt,
    oasst1_message,
    oasst1_thread,
    replies,
    split_conversations,
)
from .rows import NUMBER, PAIRS, RANKS, TEXT, convert_rows, get, in_row, ranks_of_scores, require, whole


MESSAGES = List({"role": Value("string"), "content": Value("string")})
CONVERSATION = {"prompt": MESSAGES, "completions": List(MESSAGES)}


def from_qa_feedback(dataset: Dataset) -> Dataset:
    """
    Converts human preferences among four answers, of which 13% are ties, of
    [FineGrainedRLHF](https://github.com/allenai/FineGrainedRLHF/tree/main/tasks/qa_feedback/data).

    Args:
        dataset ([`~datasets.Dataset`]): `question`, `prediction 1` to `prediction 4` and `preference`, six numbers for
            the pairs 12, 13, 14, 23, 24, 34: 1 if the first is better, 2 if the second is, 0 for neither.

    Returns:
        [`~datasets.Dataset`]: `prompt` (the question without its passages), `completions`, `pairs`: one question in 23
        has some that amount to no order.

    Example:

    ```python
    >>> row = {f"prediction {k}": f"Answer {k}" for k in (1, 2, 3, 4)} | {"question": "Why?"}
    >>> from_qa_feedback(Dataset.from_list([row | {"preference": [1, 0, 1, 2, 0, 1]}]))["pairs"][0]
    [[0, 1, 1], [0, 2, 0], [0, 3, 1], [1, 2, 2], [1, 3, 0], [2, 3, 1]]
    ```
    """

    def pairs(row):
        preference = get(row, "preference", list)
        is_valid = len(preference) == 6 and {*preference} <= {0, 1, 2}
        require(is_valid, f"column `preference`: must be six times 0, 1 or 2, got {preference}.")
        return [[i, j, v] for (i, j), v in zip(itertools.combinations(range(4), 2), preference, strict=True)]

    completions = columns(*(f"prediction {k}" for k in (1, 2, 3, 4)))
    return _converted(dataset, TEXT | PAIRS, prompt=column("question"), completions=completions, pairs=pairs)


def from_ultrafeedback(dataset: Dataset, by: str = "fine-grained_score") -> Dataset:
    """
    Converts GPT-4's scores of four completions, of [UltraFeedback](https://huggingface.co/datasets/openbmb/UltraFeedback).

    Args:
        dataset ([`~datasets.Dataset`]): `instruction` and `completions`, dicts with `response` and both scores, higher
            for better and equal for a tie; null and "N/A" are unranked.
        by (`str`, *optional*, defaults to `"fine-grained_score"`): That, the mean of four ratings, or
            `"overall_score"`, which was wrong in some rows before December 2023.

    Example:

    ```python
    >>> completions = [{"response": "No.", "fine-grained_score": 2.5}, {"response": "Yes.", "fine-grained_score": 4.0}]
    >>> from_ultrafeedback(Dataset.from_list([{"instruction": "Is it?", "completions": completions}]))[0]
    {'prompt': 'Is it?', 'completions': ['No.', 'Yes.'], 'ranks': [2, 1]}
    ```
    """
    choices = ("fine-grained_score", "overall_score")
    require(by in choices, f"`by` must be one of {choices}, got {by!r}.")

    def score(answer):
        is_rated = answer.get(by) not in (None, "N/A")
        return get(answer, f"completions.{by}", NUMBER) if is_rated else None

    return _converted(
        dataset,
        TEXT | RANKS,
        prompt=column("instruction"),
        completions=each("completions.response"),
        ranks=by_score(lambda row: [score(answer) for answer in row["completions"]]),
    )


def from_oasst1(dataset: Dataset) -> Dataset:
    """
    Converts human rankings of the replies in conversations, without ties, of
    [oasst1](https://huggingface.co/datasets/OpenAssistant/oasst1).

    Args:
        dataset ([`~datasets.Dataset`]): Whole trees, one message per row: `message_id`, `parent_id`, `text`, `role`
            (prompter or assistant) and `rank`, 0 for the best of its siblings.

    Returns:
        [`~datasets.Dataset`]: For each message with two or more ranked replies, `prompt`, the messages up to it,
        `completions`, those replies, and `ranks`.

    Example:

    ```python
    >>> messages = {"message_id": ["a", "b", "c"], "parent_id": [None, "a", "a"], "text": ["Is it?", "No.", "Yes."]}
    >>> messages |= {"role": ["prompter", "assistant", "assistant"], "rank": [None, 1, 0]}
    >>> from_oasst1(Dataset.from_dict(messages)).select_columns(["prompt", "ranks"])[0]
    {'prompt': [{'role': 'user', 'content': 'Is it?'}], 'ranks': [2, 1]}
    ```
    """
    rows = list(whole(dataset).select_columns(["message_id", "parent_id", "text", "role", "rank"]))
    messages_by_id = {row["message_id"]: row for row in rows}
    answers = {}  # rows of the ranked replies, by the message they answer
    for index, row in enumerate(rows):
        if row["role"] == "assistant" and row["rank"] is not None:
            answers.setdefault(row["parent_id"], []).append(index)
    rankings = []
    for parent_id, indices in answers.items():
        if len(indices) > 1:
            prompt = in_row(indices[0], oasst1_thread, messages_by_id, parent_id)
            completions = [[in_row(index, oasst1_message, rows[index])] for index in indices]
            ranks = ranks_of_scores([-rows[index]["rank"] for index in indices])
            rankings.append({"prompt": prompt, "completions": completions, "ranks": ranks})
    return Dataset.from_list(rankings, features=Features(CONVERSATION | RANKS))


def from_nectar(dataset: Dataset) -> Dataset:
    r"""
    Converts GPT-4's rankings of seven answers, of [Nectar](https://huggingface.co/datasets/berkeley-nest/Nectar).

    Args:
        dataset ([`~datasets.Dataset`]): `prompt`, turns that begin with `"\n\nHuman: "` or `"\n\nAssistant: "`, of
            which the last is the assistant's and empty; `answers`, dicts with `answer` and `rank`, 1 for the best.

    Example:

    ```python
    >>> answers = [{"answer": "No.", "rank": 2.0}, {"answer": "Yes.", "rank": 1.0}]
    >>> row = {"prompt": "\n\nHuman: Is it?\n\nAssistant: ", "answers": answers}
    >>> from_nectar(Dataset.from_list([row])).select_columns(["prompt", "ranks"])[0]
    {'prompt': [{'role': 'user', 'content': 'Is it?'}], 'ranks': [2, 1]}
    ```
    """
    return _converted(
        dataset,
        CONVERSATION | RANKS,
        prompt=nectar_prompt,
        completions=replies(each("answers.answer")),
        ranks=by_place(each("answers.rank", NUMBER)),
    )


def from_helpsteer2(dataset: Dataset, by: str = "helpfulness") -> Dataset:
    """
    Converts human ratings of two responses, of [HelpSteer2](https://huggingface.co/datasets/nvidia/HelpSteer2).

    Args:
        dataset ([`~datasets.Dataset`]): `prompt`, `response` and the rating; neighbouring rows share a prompt.
        by (`str`, *optional*, defaults to `"helpfulness"`): The rating to rank by, 0 to 4, higher for better and equal
            for a tie.

    Example:

    ```python
    >>> rows = {"prompt": ["Is it?", "Is it?"], "response": ["No.", "Yes."], "helpfulness": [1, 4]}
    >>> from_helpsteer2(Dataset.from_dict(rows))[0]
    {'prompt': 'Is it?', 'completions': ['No.', 'Yes.'], 'ranks': [2, 1]}
    ```
    """
    kinds = {"prompt": str, "response": str, by: NUMBER}
    rows = [{name: in_row(i, get, row, name, kinds[name]) for name in kinds} for i, row in enumerate(whole(dataset))]
    rankings, index = [], 0
    for prompt, group in itertools.groupby(rows, key=lambda row: row["prompt"]):
        group = list(group)
        message = "column `prompt`: is in no neighbouring row too. Convert before you shuffle or filter."
        in_row(index, require, len(group) > 1, message)
        ranks = ranks_of_scores([row[by] for row in group])
        rankings.append({"prompt": prompt, "completions": [row["response"] for row in group], "ranks": ranks})
        index += len(group)
    return Dataset.from_list(rankings, features=Features(TEXT | RANKS))


def from_helpsteer2_preference(dataset: Dataset) -> Dataset:
    """
    Converts human preferences, of `data_dir="preference"` of [HelpSteer2](https://huggingface.co/datasets/nvidia/HelpSteer2).

    Args:
        dataset ([`~datasets.Dataset`]): `prompt`, `response_1`, `response_2` and `preference_strength`, -3 to 3,
            negative if the first is better, 0 for about the same.

    Example:

    ```python
    >>> row = {"prompt": "Is it?", "response_1": "No.", "response_2": "Yes.", "preference_strength": 2}
    >>> from_helpsteer2_preference(Dataset.from_list([row]))[0]
    {'prompt': 'Is it?', 'completions': ['No.', 'Yes.'], 'ranks': [2, 1]}
    ```
    """
    return _converted(
        dataset,
        TEXT | RANKS,
        prompt=column("prompt"),
        completions=columns("response_1", "response_2"),
        ranks=by_strength("preference_strength"),
    )


def from_helpsteer3(dataset: Dataset) -> Dataset:
    """
    Converts human preferences, of [HelpSteer3](https://huggingface.co/datasets/nvidia/HelpSteer3).

    Args:
        dataset ([`~datasets.Dataset`]): `context`, a list of messages; `response1`, `response2`; `overall_preference`,
            -3 to 3, negative if the first is better, 0 for about the same.

    Example:

    ```python
    >>> row = {"context": [{"role": "user", "content": "Is it?"}], "response1": "No.", "response2": "Yes."}
    >>> from_helpsteer3(Dataset.from_list([row | {"overall_preference": -1}]))["ranks"][0]
    [1, 2]
    ```
    """
    return _converted(
        dataset,
        CONVERSATION | RANKS,
        prompt=messages("context"),
        completions=replies(columns("response1", "response2")),
        ranks=by_strength("overall_preference"),
    )


def from_chatbot_arena(dataset: Dataset) -> Dataset:
    """
    Converts human preferences between two conversations, of Chatbot Arena's
    [33k](https://huggingface.co/datasets/lmsys/chatbot_arena_conversations) or
    [100k](https://huggingface.co/datasets/lmarena-ai/arena-human-preference-100k).

    Args:
        dataset ([`~datasets.Dataset`]): `conversation_a`, `conversation_b`, messages with equal user turns; `winner`:
            "model_a", "model_b", "tie" or "tie (bothbad)".

    Returns:
        [`~datasets.Dataset`]: `prompt`, the turns that both share; `completions`, the turns from where they part, more
        than one if that is before the last reply; `ranks`; `both_bad`, a bool.

    Example:

    ```python
    >>> question = {"role": "user", "content": "Is it?"}
    >>> a, b = [[question, {"role": "assistant", "content": answer}] for answer in ("No.", "Yes.")]
    >>> row = {"conversation_a": a, "conversation_b": b, "winner": "tie (bothbad)"}
    >>> from_chatbot_arena(Dataset.from_list([row])).select_columns(["ranks", "both_bad"])[0]
    {'ranks': [1, 1], 'both_bad': True}
    ```
    """
    ranks = {"model_a": [1, 2], "model_b": [2, 1], "tie": [1, 1], "tie (bothbad)": [1, 1]}

    def convert(row):
        winner = get(row, "winner", str)
        require(winner in ranks, f"column `winner`: must be one of {list(ranks)}, got {winner!r}.")
        conversations = [messages(name)(row) for name in ("conversation_a", "conversation_b")]
        judgement = {"ranks": ranks[winner], "both_bad": winner == "tie (bothbad)"}
        return split_conversations(*conversations) | judgement

    return convert_rows(dataset, convert, CONVERSATION | RANKS | {"both_bad": Value("bool")})


def from_arena_55k(dataset: Dataset) -> Dataset:
    """
    Converts human preferences between two conversations, of Chatbot Arena's
    [55k](https://huggingface.co/datasets/lmarena-ai/arena-human-preference-55k).

    Args:
        dataset ([`~datasets.Dataset`]): `prompt`, `response_a`, `response_b`, each a list of turns in JSON, where null
            is an empty turn; `winner_model_a`, `winner_model_b`, `winner_tie`, one of which is 1.

    Returns:
        [`~datasets.Dataset`]: `prompt`, `completions` and `ranks`, as [`from_chatbot_arena`].

    Example:

    ```python
    >>> row = {"prompt": '["Is it?"]', "response_a": '["No."]', "response_b": '["Yes."]'}
    >>> row |= {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1}
    >>> from_arena_55k(Dataset.from_list([row]))["ranks"][0]
    [1, 1]
    ```
    """
    ranks = {"winner_model_a": [1, 2], "winner_model_b": [2, 1], "winner_tie": [1, 1]}

    def convert(row):
        winners = [name for name in ranks if get(row, name, NUMBER) == 1]
        require(len(winners) == 1, f"column `winner_tie`: must be 1, or one of {list(ranks)[:2]}, got {winners} at 1.")
        conversations = [arena_55k_messages(row, name) for name in ("response_a", "response_b")]
        return split_conversations(*conversations) | {"ranks": ranks[winners[0]]}

    return convert_rows(dataset, convert, CONVERSATION | RANKS)


def from_webgpt(dataset: Dataset) -> Dataset:
    """
    Converts human preferences between two answers, of
    [WebGPT comparisons](https://huggingface.co/datasets/openai/webgpt_comparisons).

    Args:
        dataset ([`~datasets.Dataset`]): `question`, a dict with `full_text`; `answer_0`, `answer_1`; `score_0`,
            `score_1`, of sum 0, positive if that answer is better, 0 for a tie.

    Example:

    ```python
    >>> row = {"question": {"full_text": "Is it?"}, "answer_0": "No.", "answer_1": "Yes."}
    >>> from_webgpt(Dataset.from_list([row | {"score_0": -0.5, "score_1": 0.5}]))[0]
    {'prompt': 'Is it?', 'completions': ['No.', 'Yes.'], 'ranks': [2, 1]}
    ```
    """
    return _converted(
        dataset,
        TEXT | RANKS,
        prompt=column("question.full_text"),
        completions=columns("answer_0", "answer_1"),
        ranks=by_score(columns("score_0", "score_1", kind=NUMBER)),
    )


def _converted(dataset: Dataset, types: dict[str, Any], **readers: Reader) -> Dataset:
    """Converts each row by a reader for each of its new columns."""
    return convert_rows(dataset, lambda row: {name: read(row) for name, read in readers.items()}, types)
