"""The page on which people rank completions, by keyboard or mouse."""

from collections.abc import Callable

import gradio as gr

from trl_ext import format_ranking
from trl_ext.data.items import COMPLETIONS_FILE, Item

from .session import Session
from .text import as_text


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


class Page:
    """
    The parts of the page, and the answers to its events, each of which is a dict of the parts that change.

    Args:
        folder (`str`): The folder of the completions and the judgements.
        items (`list[Item]`): All that are to be ranked.

    Attributes:
        blocks (`gradio.Blocks`): The page, to be launched.
    """

    def __init__(self, folder: str, items: list[Item]):
        self.folder = folder
        self.most = max(len(item.completions) for item in items)
        self.places = [UNRANKED, *map(str, range(1, self.most + 1))]
        with gr.Blocks(title="Rank completions") as self.blocks:
            self.session = gr.State(None)
            with gr.Column(visible=True) as self.door:
                self._lay_out_door()
            with gr.Column(visible=False) as self.room:
                self._lay_out_room()
            self._connect()

    # --- Parts ---

    def _lay_out_door(self) -> None:
        gr.Markdown("## Rank completions")
        self.name = gr.Textbox(label="Your name", elem_id="name", autofocus=True, info="letters, digits and . _ -")
        self.enter = gr.Button("Start", variant="primary", elem_id="start")

    def _lay_out_room(self) -> None:
        self.status = gr.Markdown(elem_id="status")
        # What the window shows, told by the window itself: while an answer is on its way, or if it could not be shown,
        # the session has gone on to an item that nobody has seen
        self.shown_key = gr.Textbox(visible="hidden", elem_id="shown-key")
        self.prompt = gr.Textbox(label="Prompt", interactive=False, lines=2, max_lines=20, elem_id="prompt")
        self.cards, self.radios = [], []
        for i in range(self.most):
            letter = LETTERS[i] if self.most <= len(LETTERS) else str(i + 1)
            box = {"lines": 2, "max_lines": 20, "interactive": False}
            with gr.Row():
                self.cards.append(gr.Textbox(label=letter, **box, scale=5, elem_id=f"completion-{i}"))
                self.radios.append(gr.Radio(self.places, label="Place", value=UNRANKED, scale=2, elem_id=f"place-{i}"))
        self.ranking = gr.Textbox(
            label="Ranking, best first",
            placeholder="B > C = D > A",
            elem_id="ranking",
            info="Enter goes on. > is better, = is tied. Alt+S skips, Alt+F flags, Alt+U goes back.",
        )
        with gr.Row():
            self.submit = gr.Button("Next (Enter)", variant="primary", elem_id="submit")
            self.skip = gr.Button("Skip (Alt+S)", elem_id="skip")
            self.flag = gr.Button("Flag: something is wrong (Alt+F)", elem_id="flag")
            self.undo = gr.Button("Back (Alt+U)", elem_id="undo")

    def _connect(self) -> None:
        views = [self.door, self.room, self.status, self.shown_key, self.prompt]
        views += [*self.cards, *self.radios, self.ranking]
        shown = [self.session, self.shown_key]
        for event in (self.enter.click, self.name.submit):
            event(self.start, self.name, [self.session, *views]).then(None, js=FOCUS)
        for event in (self.submit.click, self.ranking.submit):
            event(self.answer, [*shown, self.ranking], views).then(None, js=FOCUS)
        self.skip.click(self.put_aside(""), shown, views).then(None, js=FOCUS)
        self.flag.click(self.put_aside("flagged"), shown, views).then(None, js=FOCUS)
        self.undo.click(self.back, self.session, views).then(None, js=FOCUS)
        for radio in self.radios:
            radio.input(self.place, self.radios, self.ranking)

    # --- Events ---

    def start(self, text: str) -> dict:
        try:
            session = Session(self.folder, text.strip())
            if max((len(item.completions) for item in session.items.values()), default=0) > self.most:
                raise ValueError(f"{COMPLETIONS_FILE} has longer lists than when the page was started. Restart it.")
            entered = {self.door: gr.update(visible=False), self.room: gr.update(visible=True)}
            return {self.session: session, **entered, **self.show(session)}
        except (ValueError, OSError) as error:
            gr.Warning(str(error))
            return {self.session: None}

    def answer(self, session: Session | None, key: str, text: str) -> dict:
        return self.judge(session, key, lambda session: session.submit(text), text)

    def put_aside(self, flag: str) -> Callable:
        return lambda session, key: self.judge(session, key, lambda session: session.skip(flag))

    def back(self, session: Session | None) -> dict:
        if session is None:
            return self.leave()
        try:
            return self.show(session, session.undo())
        except (ValueError, OSError) as error:
            gr.Warning(str(error))
            return {self.status: str(error)}

    def place(self, *chosen: str) -> str:
        return format_ranking([None if x == UNRANKED else int(x) for x in chosen])

    # --- Answers ---

    def judge(self, session: Session | None, key: str, act: Callable[[Session], None], text: str = "") -> dict:
        """Judges the item that the window shows, if the session still waits for that, and shows the next one."""
        if session is None:
            return self.leave()
        if session.item is not None and key == session.key:
            try:
                act(session)
            except (ValueError, OSError) as error:
                gr.Warning(f"Not recorded. {error}")
                return {self.ranking: text}
        return self.show(session)

    def show(self, session: Session, text: str = "") -> dict:
        view = {self.status: session.status, self.shown_key: session.key}
        view[self.ranking] = gr.update(value=text, interactive=session.item is not None)
        if session.item is None:
            hidden = {x: gr.update(visible=False) for x in [*self.cards, *self.radios]}
            return view | {self.prompt: "All done. Thank you!"} | hidden
        view[self.prompt] = as_text(session.item.prompt)
        shown = session.shown
        for i, (card, radio) in enumerate(zip(self.cards, self.radios, strict=True)):
            is_there = i < len(shown)
            view[card] = gr.update(value=shown[i] if is_there else "", visible=is_there)
            view[radio] = gr.update(value=UNRANKED, visible=is_there, choices=self.places[: len(shown) + 1])
        return view

    def leave(self) -> dict:
        gr.Warning("The page was started anew, and does not know who you are. Type your name to go on.")
        return {self.door: gr.update(visible=True), self.room: gr.update(visible=False)}
