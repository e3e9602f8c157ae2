"""The phrases, sentences and plots of the built-in stories: how the words of `story_words` make a story.

Variables: `h` hero, `f` friend, `t` the thing the story is about. A plot has three paragraphs: the hero and
an outing, a problem, and what came of it. Sentence frames are few and choices many, so that a small model
soon knows the frames, and what is left to predict is the entropy of the choices.
"""


def _lines(text: str) -> tuple[str, ...]:
    """One alternative per line; " | " is a paragraph break of the story, and "~" a line break at its end."""
    return tuple(line.strip().replace(" | ", "\n\n").replace("~", "\n") for line in text.strip().splitlines())


PHRASES = {
    "who": ("[girl:h]", "[boy:h]"),
    "friend": ("[girl:f]", "[boy:f]"),
    "kind": ("{h.child}", "[animal]"),
    "someone": ("child", "[animal]"),
    "where": ("the [adj] [place]",),
    "spot": ("[near] the [adj] [place]",),
    "outing": ("One [day] day, {h.he} [went] to [where] with [items].",),
    "item": ("[a adj] [thing]",),
    "food": ("[number] [adj] [foods]",),
    "toys": ("[item], [item] and [item]",),
    "items": ("[item], [item] and [food]", "[item], [food] and [food]", "[item], [item], [food] and [food]"),
    "close": ("[glad] [last]", "[last] [glad]", "[glad]"),
}

SENTENCES = {
    # The hero and an outing.
    "start": _lines(
        """
        One [day] day, [who], [a trait] [kind], [went] to [where] with [items].
        "What [a day] day!" [said] [who], [a trait] [kind]. {h.He} [went] to [where] with [items].
        [who] was [a trait] [kind] who loved [fun], [fun] and [fun]. [outing]
        """
    ),
    # What many plots share.
    "sorrow": _lines(
        """
        "[dismay]! [dismay]!" [said] {h}, [bad] and [bad].
        {h} felt [bad], [bad] and [bad].
        """
    ),
    "arrival": ("Then [friend], [a trait] [someone], [went] by with [items].",),
    "glad": _lines(
        """
        {h} felt [trait], [trait] and [trait].
        {h} was as [trait] as [a trait] [animal] with [items].
        "[joy]! [joy]!" [said] {h}, [trait] and [trait].
        """
    ),
    "last": _lines(
        """
        That night {h.he} dreamed of [fun], [fun] and [fun].
        At home {h.he} ate [food], [food] and [food].
        """
    ),
    "gift": _lines(
        """
        {f} [how] gave {h.him} [items].
        They ate [food], [food] and [food].
        They played with [toys].
        """
    ),
    # Lost and found.
    "lost": ("But [spot], {h.his} [adj] [thing:t] was gone!",),
    "search": ("{h.He} looked [spot], [spot] and [spot], but found only [items].",),
    "found": ('"The {t} is [spot]!" [said] {f} [how].',),
    # A broken thing mended.
    "broken": ("But [spot], {h.his} [adj] [thing:t] fell apart.",),
    "mended": ("They [how] mended the {t} with [toys].",),
    # Sharing.
    "hunger": ("At noon {h.he} sat [spot] and ate [food], [food] and [food].",),
    "hungry": ("Then [friend], [a trait] [someone], [went] by with [toys].",),
    "share": ('"I have no food," [said] {f}. {h} [how] gave {f.him} [food] and [food].',),
    "thanks": ("{f} [how] gave {h.him} [toys].", "They played with [toys]."),
    # A fear overcome.
    "fear": ("But [spot] stood [a trait] [animal] with [items].",),
    "courage": ("{h.He} [how] took [number] steps, and it let {h.him} pass. Then {h.he} found [items].",),
    # Helping a friend.
    "stuck": ("But [spot], {f.his} [adj] [thing:t] got stuck.",),
    "pull": ("They pulled [how] with [toys], and out it came!",),
    # A surprise.
    "hiding": ("But everyone hid, [spot], [spot] and [spot].",),
    "surprise": ('"Surprise!" [said] [friend], [a trait] [someone] with [items].',),
    # The weather spoils a plan.
    "rain": ("But [spot], it rained on [items].",),
    "shelter": ("They [went] to [where] and made a fort from [toys].",),
    # A new friend.
    "alone": ("[^spot] sat [friend], [a trait] [someone] with [items].",),
    "hello": ('"Do you like [fun]?" [said] {h}. "No," [said] {f}, "but I like [fun] and [fun]."',),
    # A promise kept.
    "promise": ("But {h.he} had promised to bring [items] to [where].",),
    "kept": ("They [how] [went] there and kept the promise.",),
    # A trade.
    "desire": ("But {h.he} wanted [a adj] [thing:t] and had only [item].",),
    "trade": ("{h.He} traded it for [items], that for [toys], and that for the {t}.",),
    # The plots, paragraph by paragraph.
    "story": _lines(
        """
        [start] | [lost] [sorrow] [search] | [arrival] [found] [gift] [close]~
        [start] | [broken] [sorrow] | [arrival] [mended] [gift] [close]~
        [start] | [hunger] [hungry] | [share] [thanks] [close]~
        [start] | [fear] [sorrow] | [courage] [close]~
        [start] | [arrival] [stuck] | [pull] [gift] [close]~
        [start] | [hiding] [sorrow] | [surprise] [gift] [close]~
        [start] | [arrival] [rain] | [shelter] [gift] [close]~
        [start] | [alone] [hello] | [gift] [close]~
        [start] | [promise] [arrival] | [kept] [gift] [close]~
        [start] | [desire] [sorrow] | [trade] [close]~
        """
    ),
}
