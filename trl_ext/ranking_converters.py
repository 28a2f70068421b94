"""
Datasets of judged completions, as datasets of the `ranking` type.

| function | judgement | better is |
| --- | --- | --- |
| [`from_scores`] | `scores` | higher |
| [`from_pairs`] | `chosen`, `rejected`, perhaps `tie` | `chosen` |
| [`from_qa_feedback`] | six times 0, 1 or 2 | 1: the first, 2: the second |
| [`from_ultrafeedback`] | `fine-grained_score` or `overall_score` | higher |
| [`from_oasst1`], [`from_nectar`] | `rank` | lower |
| [`from_helpsteer2`] | `helpfulness` or another rating | higher |
| [`from_helpsteer2_preference`], [`from_helpsteer3`] | -3 to 3 | negative: the first, positive: the second |
| [`from_chatbot_arena`], [`from_arena_55k`] | a winner or a tie | the one named |
| [`from_webgpt`] | `score_0`, `score_1` | higher |

All take a [`~datasets.Dataset`] and return one with `prompt`, `completions` and `ranks`, unless they say otherwise,
and none of the source's other columns. Where the source is not as documented, they raise a ValueError that names the
column, and the row if it is one row's. Rows of no use, with fewer than two completions ranked, are converted like
others: [`~trl_ext.ranking_data.prepare_rankings`] finds them.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from datasets import Dataset, Features, List, Value
from trl.data_utils import maybe_extract_prompt

from .ranking_data import prepare_rankings, require, weak_order


NUMBER = (int, float)
KINDS = {str: "text", list: "a list", dict: "a dict", NUMBER: "a number"}

MESSAGES = List({"role": Value("string"), "content": Value("string")})
TEXT = {"prompt": Value("string"), "completions": List(Value("string"))}
CONVERSATION = {"prompt": MESSAGES, "completions": List(MESSAGES)}
RANKS = {"ranks": List(Value("int64"))}
PAIRS = {"pairs": List(List(Value("int64")))}


# --- Any source ---


def from_scores(dataset: Dataset, tie_threshold: float = 0.0) -> Dataset:
    """
    Rank completions by their scores, near ones tied.

    Ties chain, or they would not be transitive: the scores are sorted and neighbours within the threshold are tied, so
    the best and the worst of a tie may be further apart.

    Args:
        dataset ([`~datasets.Dataset`]): `prompt`, `completions` and `scores`, a number for each completion, higher for
            better; null or NaN is unranked.
        tie_threshold (`float`, *optional*, defaults to `0.0`): Neighbours that differ by no more than this are tied.

    Example:

    ```python
    >>> row = {"prompt": "2 + 2 =", "completions": [" 5", " 4", " four"], "scores": [0.1, 0.9, 0.8]}
    >>> from_scores(Dataset.from_list([row]), tie_threshold=0.1)["ranks"][0]
    [2, 1, 1]
    ```
    """
    require(0 <= tie_threshold < math.inf, f"`tie_threshold` must be a number from 0, got {tie_threshold}.")
    for name in (*TEXT, "scores"):
        require(name in dataset.features, f"column `{name}`: is missing, got {dataset.column_names}. Rename yours.")

    def convert(row):
        completions, scores = _get(row, "completions", list), _get(row, "scores", list)
        is_valid = len(scores) == len(completions) and all(
            score is None or (isinstance(score, NUMBER) and not math.isinf(score)) for score in scores
        )
        expected = f"must be {len(completions)} finite numbers or nulls, one for each completion"
        require(is_valid, f"column `scores`: {expected}, got {scores!r}.")
        return {name: row[name] for name in TEXT} | {"ranks": _ranks_of_scores(scores, tie_threshold)}

    return _convert_rows(dataset, convert, {name: dataset.features[name] for name in TEXT} | RANKS)


def from_pairs(dataset: Dataset) -> Dataset:
    """
    Gather the pairs of each prompt into one ranking.

    Args:
        dataset ([`~datasets.Dataset`]): TRL's preference type, text or conversational: `prompt`, `chosen`, `rejected`
            and optionally `tie`, true where the order means nothing. Without `prompt`, that is the beginning that the
            two share; for texts it can include the first letters of both answers, which then differs between pairs
            and keeps them from meeting in one ranking.

    Returns:
        [`~datasets.Dataset`]: `prompt`, `completions` (the distinct ones), and either `ranks`, if the pairs amount to
        an order ([`~trl_ext.ranking_data.weak_order`]), or `pairs`; the other is null.

    Example:

    ```python
    >>> pairs = {"chosen": [" 4", " four"], "rejected": [" 5", " 4"], "tie": [False, True]}
    >>> from_pairs(Dataset.from_dict({"prompt": ["2 + 2 ="] * 2} | pairs))[0]
    {'prompt': '2 + 2 =', 'completions': [' 4', ' 5', ' four'], 'ranks': [1, 2, 1], 'pairs': None}
    ```
    """
    rankings = {}
    for index, row in enumerate(dataset):
        pair = _in_row(index, _explicit_pair, row)
        prompt, numbers, pairs = rankings.setdefault(json.dumps(pair["prompt"]), (pair["prompt"], {}, []))
        texts = [json.dumps(pair[name]) for name in ("chosen", "rejected")]
        i, j = [numbers.setdefault(text, len(numbers)) for text in texts]
        pairs.append([i, j, 0 if row.get("tie") else 1])
    rows = []
    for prompt, numbers, pairs in rankings.values():
        ranks = weak_order(pairs, len(numbers))
        completions = [json.loads(text) for text in numbers]
        rows.append({"prompt": prompt, "completions": completions, "ranks": ranks, "pairs": None if ranks else pairs})
    completion, prompt = dataset.features["chosen"], dataset.features.get("prompt")
    if type(prompt) is not type(completion):  # then the completions hold it
        prompt = completion
    types = {"prompt": prompt, "completions": List(completion)}
    return Dataset.from_list(rows, features=Features(types | RANKS | PAIRS))


def _explicit_pair(row: dict[str, Any]) -> dict[str, Any]:
    row = {name: value for name, value in row.items() if value is not None}
    for name in ("chosen", "rejected"):
        require(
            isinstance(row.get(name), (str, list)), f"column `{name}`: must be text or messages. Fill or rename it."
        )
        require(row[name] or (row[name] == "" and "prompt" in row), f"column `{name}`: is empty. Remove the row.")
    require(row["chosen"] != row["rejected"], "columns `chosen` and `rejected`: are the same. Remove the row.")
    return maybe_extract_prompt(row)


def to_pairs(dataset: Dataset, ties: bool = False) -> Dataset:
    """
    Every judgement as a row of TRL's preference type.

    With `ties=True`, [`from_pairs`] undoes it if no two rows have the same prompt and no two completions of a row are
    the same, up to the order of completions and those that nobody judged.

    Args:
        dataset ([`~datasets.Dataset`]): Of the ranking type. Rows with both `ranks` and `pairs` give their pairs.
        ties (`bool`, *optional*, defaults to `False`): Whether to keep ties, with the earlier completion as `chosen`.

    Returns:
        [`~datasets.Dataset`]: `prompt`, `chosen`, `rejected` and, with `ties=True`, the bool `tie`.

    Example:

    ```python
    >>> row = {"prompt": "2 + 2 =", "completions": [" 5", " 4", " four"], "ranks": [2, 1, 1]}
    >>> to_pairs(Dataset.from_list([row]))[:]
    {'prompt': ['2 + 2 =', '2 + 2 ='], 'chosen': [' 4', ' four'], 'rejected': [' 5', ' 5']}
    ```
    """
    dataset = prepare_rankings(dataset, dataset_name="dataset")
    completion = dataset.features["completions"].feature
    types = {"prompt": dataset.features["prompt"], "chosen": completion, "rejected": completion, "tie": Value("bool")}
    if not ties:
        del types["tie"]

    def convert(batch):
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        pairs = [
            {"prompt": row["prompt"], "chosen": row["completions"][i], "rejected": row["completions"][j], "tie": tie}
            for row in rows
            for i, j, tie in _judgements(row["ranks"], row.get("pairs"))
            if ties or not tie
        ]
        return {name: [pair[name] for pair in pairs] for name in types}

    kwargs = {"features": Features(types), "desc": "Converting rankings to pairs"}
    return dataset.map(convert, batched=True, remove_columns=dataset.column_names, **kwargs)


def _judgements(ranks: list[int] | None, pairs: list[list[int]] | None) -> Iterator[tuple[int, int, bool]]:
    """The better completion, the worse one, and whether they are tied, which puts the earlier first."""
    if pairs is None:
        ranked = [i for i, rank in enumerate(ranks) if rank >= 0]
        for pair in itertools.combinations(ranked, 2):
            i, j = sorted(pair, key=lambda i: ranks[i])
            yield i, j, ranks[i] == ranks[j]
    else:
        for i, j, v in pairs:
            yield (min(i, j), max(i, j), True) if v == 0 else (i, j, False) if v == 1 else (j, i, False)


# --- Public datasets ---


def from_qa_feedback(dataset: Dataset) -> Dataset:
    """
    Human preferences among four answers, of which 13% are ties, from
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

    def convert(row):
        completions = [_get(row, f"prediction {k}", str) for k in (1, 2, 3, 4)]
        preference = _get(row, "preference", list)
        is_valid = len(preference) == 6 and {*preference} <= {0, 1, 2}
        require(is_valid, f"column `preference`: must be six times 0, 1 or 2, got {preference}.")
        pairs = [[i, j, v] for (i, j), v in zip(itertools.combinations(range(4), 2), preference, strict=True)]
        return {"prompt": _get(row, "question", str), "completions": completions, "pairs": pairs}

    return _convert_rows(dataset, convert, TEXT | PAIRS)


def from_ultrafeedback(dataset: Dataset, by: str = "fine-grained_score") -> Dataset:
    """
    GPT-4's scores of four completions, from [UltraFeedback](https://huggingface.co/datasets/openbmb/UltraFeedback).

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
        return _get(answer, f"completions.{by}", NUMBER) if is_rated else None

    def convert(row):
        answers = _get(row, "completions", list)
        completions = [_get(answer, "completions.response", str) for answer in answers]
        ranks = _ranks_of_scores([score(answer) for answer in answers])
        return {"prompt": _get(row, "instruction", str), "completions": completions, "ranks": ranks}

    return _convert_rows(dataset, convert, TEXT | RANKS)


def from_oasst1(dataset: Dataset) -> Dataset:
    """
    Human rankings of the replies in conversations, without ties, from
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
    rows = list(dataset.select_columns(["message_id", "parent_id", "text", "role", "rank"]))
    messages = {row["message_id"]: row for row in rows}
    replies = {}
    for index, row in enumerate(rows):
        if row["role"] == "assistant" and row["rank"] is not None:
            replies.setdefault(row["parent_id"], []).append(index)
    rankings = []
    for parent_id, indices in replies.items():
        if len(indices) > 1:
            prompt = _in_row(indices[0], _oasst1_thread, messages, parent_id)
            completions = [[_in_row(index, _oasst1_message, rows[index])] for index in indices]
            ranks = _ranks_of_scores([-rows[index]["rank"] for index in indices])
            rankings.append({"prompt": prompt, "completions": completions, "ranks": ranks})
    return Dataset.from_list(rankings, features=Features(CONVERSATION | RANKS))


def _oasst1_thread(messages: dict[str, dict[str, Any]], message_id: str | None) -> list[dict[str, str]]:
    thread = []
    while message_id is not None:
        require(message_id in messages, f"column `parent_id`: {message_id!r} is in no row. Convert whole trees.")
        thread.append(_oasst1_message(messages[message_id]))
        message_id = messages[message_id]["parent_id"]
    return thread[::-1]


def _oasst1_message(row: dict[str, Any]) -> dict[str, str]:
    roles = {"prompter": "user", "assistant": "assistant"}
    require(row["role"] in roles, f"column `role`: must be one of {list(roles)}, got {row['role']!r}.")
    return {"role": roles[row["role"]], "content": _get(row, "text", str)}


def from_nectar(dataset: Dataset) -> Dataset:
    r"""
    GPT-4's rankings of seven answers, from [Nectar](https://huggingface.co/datasets/berkeley-nest/Nectar).

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

    def convert(row):
        answers = _get(row, "answers", list)
        completions = [_reply(_get(answer, "answers.answer", str)) for answer in answers]
        ranks = _ranks_of_scores([-_get(answer, "answers.rank", NUMBER) for answer in answers])
        return {"prompt": _nectar_messages(_get(row, "prompt", str)), "completions": completions, "ranks": ranks}

    return _convert_rows(dataset, convert, CONVERSATION | RANKS)


def _nectar_messages(prompt: str) -> list[dict[str, str]]:
    before, *turns = re.split(r"\n\n(Human|Assistant):", prompt)
    names, texts = turns[::2], [text.strip() for text in turns[1::2]]
    is_valid = turns and not before and names[0] == "Human" and names[-1] == "Assistant" and not texts[-1]
    expected = r"must begin with '\n\nHuman: ' and end with '\n\nAssistant: '"
    require(is_valid, f"column `prompt`: {expected}, got {prompt!r:.80}.")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": text} for name, text in zip(names[:-1], texts[:-1], strict=True)]


def from_helpsteer2(dataset: Dataset, by: str = "helpfulness") -> Dataset:
    """
    Human ratings of two responses, from [HelpSteer2](https://huggingface.co/datasets/nvidia/HelpSteer2).

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
    rows = [{name: _in_row(i, _get, row, name, kinds[name]) for name in kinds} for i, row in enumerate(dataset)]
    rankings, index = [], 0
    for prompt, group in itertools.groupby(rows, key=lambda row: row["prompt"]):
        group = list(group)
        message = "column `prompt`: is in no neighbouring row too. Convert before you shuffle or filter."
        _in_row(index, require, len(group) > 1, message)
        ranks = _ranks_of_scores([row[by] for row in group])
        rankings.append({"prompt": prompt, "completions": [row["response"] for row in group], "ranks": ranks})
        index += len(group)
    return Dataset.from_list(rankings, features=Features(TEXT | RANKS))


def from_helpsteer2_preference(dataset: Dataset) -> Dataset:
    """
    Human preferences, from `data_dir="preference"` of [HelpSteer2](https://huggingface.co/datasets/nvidia/HelpSteer2).

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

    def convert(row):
        completions = [_get(row, name, str) for name in ("response_1", "response_2")]
        ranks = _ranks_of_strength(row, "preference_strength")
        return {"prompt": _get(row, "prompt", str), "completions": completions, "ranks": ranks}

    return _convert_rows(dataset, convert, TEXT | RANKS)


def from_helpsteer3(dataset: Dataset) -> Dataset:
    """
    Human preferences, from [HelpSteer3](https://huggingface.co/datasets/nvidia/HelpSteer3).

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

    def convert(row):
        completions = [_reply(_get(row, name, str)) for name in ("response1", "response2")]
        ranks = _ranks_of_strength(row, "overall_preference")
        return {"prompt": _messages(row, "context"), "completions": completions, "ranks": ranks}

    return _convert_rows(dataset, convert, CONVERSATION | RANKS)


def from_chatbot_arena(dataset: Dataset) -> Dataset:
    """
    Human preferences between two conversations, from Chatbot Arena's
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
        winner = _get(row, "winner", str)
        require(winner in ranks, f"column `winner`: must be one of {list(ranks)}, got {winner!r}.")
        conversations = [_messages(row, name) for name in ("conversation_a", "conversation_b")]
        judgement = {"ranks": ranks[winner], "both_bad": winner == "tie (bothbad)"}
        return _split_conversations(*conversations) | judgement

    return _convert_rows(dataset, convert, CONVERSATION | RANKS | {"both_bad": Value("bool")})


def from_arena_55k(dataset: Dataset) -> Dataset:
    """
    Human preferences between two conversations, from Chatbot Arena's
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
        winners = [name for name in ranks if _get(row, name, NUMBER) == 1]
        require(len(winners) == 1, f"column `winner_tie`: must be 1, or one of {list(ranks)[:2]}, got {winners} at 1.")
        conversations = [_arena_messages(row, name) for name in ("response_a", "response_b")]
        return _split_conversations(*conversations) | {"ranks": ranks[winners[0]]}

    return _convert_rows(dataset, convert, CONVERSATION | RANKS)


def _arena_messages(row: dict[str, Any], column: str) -> list[dict[str, str]]:
    prompts, replies = _json_turns(row, "prompt"), _json_turns(row, column)
    require(len(prompts) == len(replies), f"column `{column}`: must have {len(prompts)} turns, got {len(replies)}.")
    turns = zip(prompts, replies, strict=True)
    return [message for prompt, reply in turns for message in ({"role": "user", "content": prompt}, *_reply(reply))]


def _json_turns(row: dict[str, Any], column: str) -> list[str]:
    text = _get(row, column, str)
    try:
        turns = json.loads(text)
    except json.JSONDecodeError:
        turns = None
    is_valid = isinstance(turns, list) and turns and all(turn is None or isinstance(turn, str) for turn in turns)
    require(is_valid, f"column `{column}`: must be a list of texts in JSON, got {text!r:.80}.")
    return [turn or "" for turn in turns]


def _split_conversations(a: list[dict[str, str]], b: list[dict[str, str]]) -> dict[str, Any]:
    """The turns that both share are the prompt, except for the last: a completion has one turn at least."""
    shared = list(itertools.takewhile(lambda turns: turns[0] == turns[1], zip(a[:-1], b[:-1], strict=False)))
    users = [[turn for turn in conversation if turn["role"] == "user"] for conversation in (a, b)]
    require(
        shared and users[0] == users[1] and a[-1]["role"] == b[-1]["role"] == "assistant",
        "columns `conversation_a` and `conversation_b`: must share the user turns and end in a reply. Remove the row.",
    )
    return {"prompt": a[: len(shared)], "completions": [a[len(shared) :], b[len(shared) :]]}


def from_webgpt(dataset: Dataset) -> Dataset:
    """
    Human preferences between two answers, from
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

    def convert(row):
        question = _get(_get(row, "question", dict), "question.full_text", str)
        completions = [_get(row, name, str) for name in ("answer_0", "answer_1")]
        ranks = _ranks_of_scores([_get(row, name, NUMBER) for name in ("score_0", "score_1")])
        return {"prompt": question, "completions": completions, "ranks": ranks}

    return _convert_rows(dataset, convert, TEXT | RANKS)


# --- Rows ---


def _convert_rows(dataset: Dataset, convert: Callable, types: dict[str, Any]) -> Dataset:
    return dataset.map(
        lambda row, index: _in_row(index, convert, row),
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features(types),
        desc="Converting to rankings",
    )


def _in_row(index: int, function: Callable, *args) -> Any:
    """`function(*args)`, whose errors say in which row."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"row {index}, {error}") from None


def _get(record: Any, column: str, kind: type | tuple[type, ...]) -> Any:
    """The value of `column`, which a nested record knows by the part after the dot."""
    value = record.get(column.rpartition(".")[2]) if isinstance(record, Mapping) else None
    require(isinstance(value, kind), f"column `{column}`: must be {KINDS[kind]}, got {value!r:.80}.")
    return value


def _messages(row: dict[str, Any], column: str) -> list[dict[str, str]]:
    names = ("role", "content")
    return [{name: _get(turn, f"{column}.{name}", str) for name in names} for turn in _get(row, column, list)]


def _reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _ranks_of_strength(row: dict[str, Any], column: str) -> list[int]:
    strength = _get(row, column, NUMBER)
    require(-3 <= strength <= 3, f"column `{column}`: must be from -3 to 3, got {strength}.")
    return _ranks_of_scores([-strength, strength])


def _ranks_of_scores(scores: list[float | None], tie_threshold: float = 0.0) -> list[int | None]:
    """Ranks from 1 without gaps, None for None and NaN; on the threshold see [`from_scores`]."""
    ranks, rank, previous = {}, 0, math.inf
    for score in sorted({score for score in scores if score is not None and score == score}, reverse=True):
        gap = previous - score
        is_tied = gap <= tie_threshold or math.isclose(gap, tie_threshold)  # 0.4 - 0.3 is a little more than 0.1
        rank += not is_tied
        ranks[score], previous = rank, score
    return [ranks.get(score) for score in scores]
