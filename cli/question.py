"""The question `baton serve --ask demo` asks: long enough that it is prefilled in two chunks on the prefill worker (at
default settings), so that its waterfall shows a hand-off, and one that a very small model can answer from the text."""

from __future__ import annotations

from dataclasses import dataclass

QUESTION = "What do the runners of a relay hand over?"

PASSAGE = """\
A relay is a race for teams. Each runner of a team covers one part of the distance, called a leg, and then hands a \
short hollow stick to the next runner of the same team. This stick is called the baton. A team has finished when its \
last runner crosses the line with the baton in hand. A team that loses its baton, or that hands it over in the wrong \
place, is out of the race, no matter how fast its runners were. So a relay is not won by the fastest runners alone. It \
is won in the few metres where two runners move side by side.

The hand-over happens in a zone of thirty metres that is marked on the track. The runner who waits does not stand \
still. She starts to run while the other one is still coming, so that both have the same speed when they meet. She \
does not look back. She stretches out one hand behind her, and the runner who arrives puts the baton into it with a \
word that both have agreed on. Only when her fingers have closed around the baton does the other hand let go. For a \
short moment both runners hold it. This moment is the whole secret of the race: nobody lets go of the baton before the \
other one has it for sure, and nobody waits for the other one standing still.

Teams train this for months. They put marks on the track that tell the waiting runner when to start. If she starts too \
early, the other one cannot reach her inside the zone. If she starts too late, the two run into each other, and all \
speed is gone. Coaches measure the time that the baton needs from the first line of the zone to the last one, not the \
time of the runners, because the baton is what has to arrive. A good team of average runners often beats four stars \
who met in the same week. The best teams lose almost nothing at all: the sum of their four personal records is slower \
than the time of the team, since three of the four runners start their leg already at full speed.

There are short relays, in which each leg is a hundred metres, and long ones over mountains and through cities, in \
which a leg can take an hour. Some races are run with a sash instead of a stick, and in the water swimmers touch the \
wall. The idea is always the same. One does the first part of the work, another one does the next part, each is good \
at what he does, and what was won on one leg is not lost on the way to the next. In the old days messengers carried \
letters across whole countries in this way. At every station a fresh rider was waiting in the saddle, took the bag, \
and was gone before the tired horse of the first one had come to a halt."""


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    """What is sent."""
    shown: str


DEMO = Question(
    f"{PASSAGE}\n\nAnswer in one sentence, from the text above. {QUESTION}",
    f"(a text of {len(PASSAGE.split())} words about relay races) {QUESTION}",
)
