"""Records `make demo` as an animated picture: runs it in tmux, keeps what the terminal shows, and draws it.

    .venv/bin/python docs/images/record.py docs/images/demo.svg

Needs tmux. Nothing is invented: each frame is a screen of the run, coloured as it was. Time runs faster than it did.
"""

import subprocess
import sys
import time
from html import escape
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI, TerminalTheme
from rich.text import Text

ROOT = Path(__file__).parents[2]
COLUMNS, ROWS = 124, 34
CELL, LINE, MARGIN = 8.4, 18, 18
FRAMES = 14
SECONDS, LAST_SECONDS = 0.9, 6.0
THEME: TerminalTheme = MONOKAI
TMUX = ["tmux", "-L", "luthier-record"]


def tmux(*arguments: str) -> str:
    """Runs a tmux command on a server of its own."""
    return subprocess.run([*TMUX, *arguments], check=True, capture_output=True, text=True).stdout


def record(command: str) -> list[str]:
    """Every other screen of the command, with its colours; the last one is that of its end."""
    options = ["set-option", "-g", "status", "off", ";", "set-option", "-g", "remain-on-exit", "on", ";"]
    session = ["new-session", "-d", "-x", str(COLUMNS), "-y", str(ROWS), "-c", str(ROOT)]
    tmux("start-server", ";", *options, *session, f"printf '$ {command}\\n'; exec {command}")
    screens: list[str] = []
    try:
        while True:
            time.sleep(0.5)
            over = tmux("display-message", "-p", "#{pane_dead}").strip() == "1"
            screen = tmux("capture-pane", "-e", "-p").rstrip("\n")
            if over:
                screen = "\n".join(line for line in screen.splitlines() if not line.startswith("Pane is dead"))
            if not screens or screens[-1] != screen:
                screens.append(screen)
            if over:
                return screens
    finally:
        tmux("kill-server")


def chosen(screens: list[str]) -> list[str]:
    """FRAMES screens over the whole run, the last one among them."""
    if len(screens) <= FRAMES:
        return screens
    return [screens[round(index * (len(screens) - 1) / (FRAMES - 1))] for index in range(FRAMES)]


def lines(screen: str, console: Console) -> list[str]:
    """A screen as SVG text."""
    drawn = []
    for row, text in enumerate(Text.from_ansi(screen).split("\n", allow_blank=True)[:ROWS]):
        column = 0
        for segment in text.render(console):
            style, content = segment.style, segment.text.rstrip("\n")
            if content.strip():
                colour = style.color.get_truecolor(THEME).hex if style and style.color else THEME.foreground_color.hex
                look = f' fill="{colour}"' + (' font-weight="bold"' if style and style.bold else "")
                look += ' opacity="0.6"' if style and style.dim else ""
                words = content.strip()
                x = MARGIN + (column + content.index(words)) * CELL
                place = f'x="{x:.1f}" y="{MARGIN + (row + 1) * LINE}" textLength="{len(words) * CELL:.1f}"'
                drawn.append(f"<text {place}{look}>{escape(words, quote=False)}</text>")
            column += len(content)
    return drawn


def picture(screens: list[str]) -> str:
    """The frames one after the other; without animation the last one alone."""
    console = Console(width=COLUMNS, color_system="truecolor", force_terminal=True)
    total = SECONDS * (len(screens) - 1) + LAST_SECONDS
    rules, groups = [], []
    for number, screen in enumerate(screens):
        start, end = number * SECONDS / total * 100, (number + 1) * SECONDS / total * 100
        last = number == len(screens) - 1
        until = "" if last else f"{end:.2f}%{{visibility:hidden}}"
        first = "" if number == 0 else "0%{visibility:hidden}"
        rules.append(f"@keyframes f{number}{{{first}{start:.2f}%{{visibility:visible}}{until}}}")
        rules.append(f"#f{number}{{animation:f{number} {total:.1f}s step-end infinite}}")
        hidden = "" if last else ' visibility="hidden"'
        groups.append(f'<g id="f{number}"{hidden}>\n' + "\n".join(lines(screen, console)) + "\n</g>")
    width, height = round(2 * MARGIN + COLUMNS * CELL), 2 * MARGIN + (ROWS + 1) * LINE
    motion = "@media (prefers-reduced-motion: no-preference){" + "".join(rules) + "}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" xml:space="preserve">',
            "<title>make demo</title>",
            f"<style>text{{font:14px ui-monospace,Menlo,Consolas,monospace;white-space:pre}}{motion}</style>",
            f'<rect width="100%" height="100%" rx="8" fill="{THEME.background_color.hex}"/>',
            *groups,
            "</svg>\n",
        ]
    )


def main() -> None:
    """Records and writes the file that is named."""
    screens = record("make demo")
    Path(sys.argv[1]).write_text(picture(chosen(screens)))
    sys.stderr.write(f"{len(screens)} screens\n")


if __name__ == "__main__":
    main()
