"""
Rank completions by hand, on a local web page:

    python recipes/rank_completions.py --folder outputs/completions

where `sample_completions.py` (or you) put `completions.jsonl`. The page shows a prompt and its completions in random
order. Type a ranking, `b > c = d > a` (or `b>c=d>a`; leave out what you cannot judge), and press Enter; or choose a
place for each with the mouse. Alt+S skips, Alt+F flags and skips, Alt+U goes back to the one before.

Each judgement is on disk before the next prompt appears, and nothing is asked twice. Several people may work at once,
each under a name of their own. When done,

    python recipes/rank_completions.py --folder outputs/completions --export rankings.parquet

writes what `RankingRewardTrainer` and `RankingDPOTrainer` train on, and prints how far the annotators agree.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl_ext import format_ranking, parse_ranking
from trl_ext.data.collection import agreement, collected_rankings
from trl_ext.data.items import COMPLETIONS_FILE, Item, read_items
from trl_ext.data.judgements import Judgements


SHORTCUTS = """
<script>
document.addEventListener("keydown", event => {
  const id = {KeyS: "skip", KeyF: "flag", KeyU: "undo"}[event.code];
  if (event.altKey && id) { event.preventDefault(); document.getElementById(id)?.click(); }
});
</script>
"""
FOCUS = "() => setTimeout(() => document.querySelector('#ranking textarea, #ranking input')?.focus(), 100)"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
UNRANKED = "–"


def as_text(message: str | list[dict[str, Any]]) -> str:
    """A text or a conversation, to read."""
    if isinstance(message, str):
        return message
    return "\n\n".join(f"[{turn['role']}] {content_of(turn)}" for turn in message)


def content_of(turn: dict[str, Any]) -> str:
    """What is said in a message: a text, the parts of one, or calls of tools."""
    content, calls = turn.get("content") or "", turn.get("tool_calls") or []
    if not isinstance(content, str):
        content = "\n".join(part.get("text") or f"({part.get('type')})" for part in content)
    return "\n".join([content, *map(json.dumps, calls)]) if calls else content


class Session:
    """What one annotator does, without the page."""

    def __init__(self, folder: str, annotator: str):
        self.folder = folder
        self.items = {item.id: item for item in read_items(folder)}
        self.judgements = Judgements(folder, annotator)
        self.next()

    def next(self) -> Item | None:
        """The first item that is not judged yet."""
        self.judgements.reload()
        self.item = next((item for item in self.items.values() if item not in self.judgements), None)
        self.started = time.monotonic()
        return self.item

    @property
    def key(self) -> str:
        """A name for the present item and its texts, by which what was shown is known again; empty without one."""
        return "" if self.item is None else f"{self.item.id}/{self.item.texts}"

    @property
    def shown(self) -> list[str]:
        """The present completions, in the order in which they are shown."""
        return [as_text(self.item.completions[i]) for i in self.item.order_for(self.judgements.annotator)]

    def submit(self, text: str) -> None:
        """Keep a ranking of what is shown. Raises a ValueError for one that cannot be read."""
        try:
            shown_ranks = parse_ranking(text, len(self.item.completions))
        except ValueError as error:
            raise ValueError(f"The ranking {error}") from None
        if len(shown_ranks) - shown_ranks.count(None) < 2:
            raise ValueError("The ranking must rank two completions at least; Alt+S skips.")
        ranks = [None] * len(shown_ranks)
        for position, original in enumerate(self.item.order_for(self.judgements.annotator)):
            ranks[original] = shown_ranks[position]
        self._record(ranks)

    def skip(self, flag: str = "") -> None:
        self._record(None, flag)

    def _record(self, ranks: list[int | None] | None, flag: str = "") -> None:
        self.judgements.reload()
        if self.item not in self.judgements:  # else it was judged in another window
            self.judgements.record(self.item, ranks, time.monotonic() - self.started, flag)
        self.next()

    def undo(self) -> str:
        """Go back to the last judged item; returns the ranking that was given, as text."""
        self.judgements.reload()
        last = self.judgements.last(self.items)
        if last is None:
            return ""
        ranks = self.judgements[last]["ranks"]
        self.judgements.undo(self.items)
        self.item, self.started = self.items[last], time.monotonic()
        if ranks is None:
            return ""
        return format_ranking([ranks[i] for i in self.item.order_for(self.judgements.annotator)])

    @property
    def status(self) -> str:
        parts = [f"{sum(item in self.judgements for item in self.items.values())} of {len(self.items)} done"]
        if self.judgements.seconds_per_item is not None:
            parts.append(f"{self.judgements.seconds_per_item:.0f} s each")
        try:
            between = agreement(self.folder)
        except ValueError as error:  # in another annotator's file, which is no reason to keep this one waiting
            between = None
            parts.append(f"agreement unknown: {error}")
        if between is not None:
            parts.append(
                f"annotators agree on {between['agreement']:.0%} of {between['num_pairs']} pairs (alpha {between['alpha']:.2f})"
            )
        return " · ".join(parts)


def build_page(folder: str):
    """The page, as `gradio.Blocks`."""
    items = read_items(folder)
    if not items:
        raise ValueError(f"{Path(folder) / COMPLETIONS_FILE} is empty: there is nothing to rank.")
    import gradio as gr

    most = max(len(item.completions) for item in items)
    places = [UNRANKED, *map(str, range(1, most + 1))]

    with gr.Blocks(title="Rank completions") as page:
        session = gr.State(None)
        with gr.Column(visible=True) as door:
            gr.Markdown("## Rank completions")
            name = gr.Textbox(label="Your name", elem_id="name", autofocus=True, info="letters, digits and . _ -")
            enter = gr.Button("Start", variant="primary", elem_id="start")
        with gr.Column(visible=False) as room:
            status = gr.Markdown(elem_id="status")
            # What the window shows, told by the window itself: while an answer is on its way, or if it could not be
            # shown, the session has gone on to an item that nobody has seen
            shown_key = gr.Textbox(visible="hidden", elem_id="shown-key")
            prompt = gr.Textbox(label="Prompt", interactive=False, lines=2, max_lines=20, elem_id="prompt")
            cards, radios = [], []
            for i in range(most):
                with gr.Row():
                    cards.append(
                        gr.Textbox(label=LETTERS[i] if most <= 26 else str(i + 1), lines=2, max_lines=20,
                                   interactive=False, scale=5, elem_id=f"completion-{i}")
                    )  # fmt: skip
                    radios.append(gr.Radio(places, label="Place", value=UNRANKED, scale=2, elem_id=f"place-{i}"))
            ranking = gr.Textbox(
                label="Ranking, best first", placeholder="B > C = D > A", elem_id="ranking",
                info="Enter goes on. > is better, = is tied. Alt+S skips, Alt+F flags, Alt+U goes back.",
            )  # fmt: skip
            with gr.Row():
                submit = gr.Button("Next (Enter)", variant="primary", elem_id="submit")
                skip = gr.Button("Skip (Alt+S)", elem_id="skip")
                flag = gr.Button("Flag: something is wrong (Alt+F)", elem_id="flag")
                undo = gr.Button("Back (Alt+U)", elem_id="undo")

        def show(session: Session, text: str = "") -> dict:
            view = {status: session.status, ranking: gr.update(value=text, interactive=session.item is not None)}
            view[shown_key] = session.key
            if session.item is None:
                view[prompt] = "All done. Thank you!"
                return view | {x: gr.update(visible=False) for x in [*cards, *radios]}
            view[prompt] = as_text(session.item.prompt)
            shown = session.shown
            for i, (card, radio) in enumerate(zip(cards, radios, strict=True)):
                is_there = i < len(shown)
                view[card] = gr.update(value=shown[i] if is_there else "", visible=is_there)
                view[radio] = gr.update(value=UNRANKED, visible=is_there, choices=places[: len(shown) + 1])
            return view

        def start(text: str):
            try:
                new = Session(folder, text.strip())
                if max((len(item.completions) for item in new.items.values()), default=0) > most:
                    raise ValueError(
                        f"{COMPLETIONS_FILE} has longer lists than when the page was started. Restart it."
                    )
                return {session: new, door: gr.update(visible=False), room: gr.update(visible=True), **show(new)}
            except (ValueError, OSError) as error:
                gr.Warning(str(error))
                return {session: None}

        def judge(session: Session | None, key: str, act: Callable[[Session], None], text: str = "") -> dict:
            """Judge the item that the window shows, if the session still waits for that, and show what is next."""
            if session is None:
                return leave()
            if session.item is not None and key == session.key:
                try:
                    act(session)
                except (ValueError, OSError) as error:
                    gr.Warning(f"Not recorded. {error}")
                    return {ranking: text}
            return show(session)

        def leave() -> dict:
            gr.Warning("The page was started anew, and does not know who you are. Type your name to go on.")
            return {door: gr.update(visible=True), room: gr.update(visible=False)}

        def answer(session: Session | None, key: str, text: str):
            return judge(session, key, lambda session: session.submit(text), text)

        def put_aside(flag: str):
            return lambda session, key: judge(session, key, lambda session: session.skip(flag))

        def back(session: Session | None):
            if session is None:
                return leave()
            try:
                return show(session, session.undo())
            except (ValueError, OSError) as error:
                gr.Warning(str(error))
                return {status: str(error)}

        def place(*chosen: str) -> str:
            return format_ranking([None if x == UNRANKED else int(x) for x in chosen])

        views = [door, room, status, shown_key, prompt, *cards, *radios, ranking]
        for event in (enter.click, name.submit):
            event(start, name, [session, *views]).then(None, js=FOCUS)
        for event in (submit.click, ranking.submit):
            event(answer, [session, shown_key, ranking], views).then(None, js=FOCUS)
        skip.click(put_aside(""), [session, shown_key], views).then(None, js=FOCUS)
        flag.click(put_aside("flagged"), [session, shown_key], views).then(None, js=FOCUS)
        undo.click(back, session, views).then(None, js=FOCUS)
        for radio in radios:
            radio.input(place, radios, ranking)
    return page


def check_export(file: str) -> None:
    if Path(file).suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"--export {file}: expected a name that ends in .parquet or .jsonl.")


def export(folder: str, file: str) -> None:
    check_export(file)
    dataset = collected_rankings(folder)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(file) if file.endswith(".parquet") else dataset.to_json(file)
    print(f"{len(dataset)} rankings by {len(set(dataset['annotator']))} annotators: {file}")
    between = agreement(folder)
    if between is not None:
        print(
            f"Two annotators agree on {between['agreement']:.1%} of {between['num_pairs']} pairs, and on "
            f"{between['strict_agreement']:.1%} where neither has a tie; Krippendorff's alpha {between['alpha']:.3f}"
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where completions.jsonl is, and judgements go")
    parser.add_argument("--export", metavar="FILE", help="write the rankings to a .parquet or .jsonl file, and end")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets others on your network in")
    parser.add_argument("--port", type=int, default=7860)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        if args.export:
            export(args.folder, args.export)
            return
        page = build_page(args.folder)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except ImportError:
        sys.exit("error: the page needs Gradio: pip install -e '.[collect]'")
    page.launch(server_name=args.host, server_port=args.port, head=SHORTCUTS, inbrowser=False)


if __name__ == "__main__":
    main()
