"""The phrases, sentences and plots of the built-in stories: how the words of `story_words` make a story.

Variables: `h` hero, `f` friend, `t` the thing, animal or deed that the story is about. A plot has three paragraphs:
the hero and an outing, a problem, and what came of it. Sentence frames are few and choices many, so that a small
model soon knows the frames, and what is left to predict is the entropy of the choices.
"""


def _lines(text: str) -> tuple[str, ...]:
    """One alternative per line; " | " is a paragraph break of the story, and "~" a line break at its end."""
    return tuple(line.strip().replace(" | ", "\n\n").replace("~", "\n") for line in text.strip().splitlines())


PHRASES = {
    "who": ("[girl:h]", "[boy:h]"),
    "friend": ("[girl:f]", "[boy:f]"),
    "kind": ("{h.child}", "[animal]"),
    "someone": ("child", "[animal]"),
    "look": ("[adj]", "[adj] [color]"),
    "spot": ("[near] the [look] [place]",),
    "item": ("[a look] [thing]",),
    "food": ("[number] [look] [foods]",),
    "delight": ("[fun]", "[look] [fun]"),
    "scrap": ("[look] [stuff]",),
    "toys": ("[item] and [item]", "[item], [item] and [item]"),
    "meal": ("[food] and [food]", "[food], [food] and [food]"),
    "items": (
        "[item] and [food]",
        "[food] and [item]",
        "[item], [item] and [food]",
        "[item], [item] and [item]",
    ),
    "close": ("[glad] [last]", "[glad]", "[last]"),
}

SENTENCES = {
    # The hero and an outing.
    "start": _lines(
        """
        [who] was [a trait] [kind] who loved [delight], [delight] and [delight]. One [day] day, {h.he} [went] to the [look] [place] with [items].
        One [day] day, [who], [a trait] [kind], [went] to the [look] [place] with [items].
        "What [a day] day!" [said] [who], [a trait] [kind]. {h.He} took [items] and [went] to the [look] [place].
        [^near] the [look] [place] lived [who], [a trait], [trait] [kind] with [items]. {h.He} loved [delight] and [delight].
        """
    ),
    # What many plots share.
    "sorrow": _lines(
        """
        "[dismay]!" [said] {h}, [bad] and [bad].
        {h} felt [bad], [bad] and [bad].
        "[dismay]! [dismay]!" [said] {h} and sat down [spot].
        """
    ),
    "arrival": _lines(
        """
        Then [friend], [a trait] [someone], [went] by with [items].
        Then [friend], [a trait] [someone], [went] up from the [look] [place].
        Then {h.he} met [friend], [a trait] [someone] with [items].
        """
    ),
    "glad": _lines(
        """
        {h} felt [good], [good] and [good].
        {h} was as [good] as [a trait] [animal] with [items].
        "[joy]! [joy]!" [said] {h}, [good] and [good].
        """
    ),
    "last": _lines(
        """
        That night {h.he} dreamed of [delight], [delight] and [delight].
        For supper there were [meal].
        On the way home, {h.he} sang about [delight], [delight] and [delight].
        """
    ),
    "gift": _lines(
        """
        {f} [how] gave {h} [items].
        {h} and {f} ate [meal].
        {h} and {f} played with [toys].
        """
    ),
    # Lost and found.
    "lost": ("But [spot], {h.his} [look] [thing:t] was gone!",),
    "search": _lines(
        """
        {h.He} looked [spot], [spot] and [spot], but found only [items].
        It was not [spot], not [spot] and not [spot].
        """
    ),
    "found": ('"Your {t} is [spot]!" [said] {f} [how].',),
    # Sharing.
    "hunger": ("At noon {h.he} sat down [spot] to eat [meal].",),
    "hungry": ('"I have only [food]," said {f} [how].',),
    "share": ("{h} [how] gave {f} [meal].",),
    # A fear overcome.
    "fear": ("But to get home, {h.he} had to pass [a trait] [color] [animal] [spot].",),
    "courage": ("{h} [how] held [item] and [item] and took [number] steps.",),
    "over": ("It was no worse than [a trait] [animal] with [items].",),
    # A cart that is stuck.
    "stuck": ("{f.His} [look] [cart:t] was stuck [spot]. They took out [items], but it did not move.",),
    "lever": ("{h} [how] put [scrap], [scrap] and [scrap] under it, and out it came!",),
    # A broken thing mended.
    "broken": ("But [spot], {h.his} [look] [thing:t] fell apart.",),
    "mended": ("They [how] mended the {t} with [scrap], [scrap] and [scrap].",),
    # A surprise.
    "hiding": ("But everyone hid, one [spot], one [spot] and one [spot].",),
    "surprise": ('"Surprise!" [said] [friend], [a trait] [someone]. It was {h.his} birthday!',),
    # The weather spoils a plan.
    "plan": ('"Come and play with [toys]!" [said] {f}.',),
    "spoiled": ("But then came [weather], [weather] and [weather].",),
    "shelter": ("They [went] into the [look] [place] and made a fort from [scrap], [scrap] and [scrap].",),
    # A skill learned.
    "wish": ("{h.He} wanted to [skill:t]. {h.He} tried it with [item] and with [item], but fell down.",),
    "mastery": ("After [number] days, {h} could {t} like [a trait] [animal].",),
    # A new friend.
    "alone": ("[^spot] sat [friend], [a trait] [someone], [bad] and [bad].",),
    "hello": ('"Do you like [delight]?" [said] {h}. "No," said {f}, "but I like [delight] and [delight]."',),
    # A promise kept.
    "promise": ("But {h.he} had promised to bring [food] to the [look] [place].",),
    "duty": ("But {h} [how] kept {h.his} promise and came back with [items].",),
    # Seeds.
    "sowing": ("[^spot], {h.he} [how] planted [number] [look] seeds.",),
    "waiting": ("{h.He} put [scrap] and [scrap] around them and waited [number] days.",),
    "harvest": ("Then one [day] day there were [meal].",),
    # A trade.
    "desire": ("{h.He} wanted [a look] [thing:t] but had only [item].",),
    "trade": ("{h} traded it for [item], that for [item], and that for [food].",),
    "bargain": ("At last {h} traded [food] and [item] for the {t}.",),
    # A lost baby animal.
    "baby": ("[^spot] sat a baby [animal], [bad] and [bad].",),
    "comfort": ("{h} [how] gave it [meal].",),
    "mother": ("Then its mother [went] up from the [look] [place] with [items].",),
    # The plots, paragraph by paragraph.
    "story": _lines(
        """
        [start] | [lost] [sorrow] [search] | [arrival] [found] [gift] [close]~
        [start] | [hunger] [arrival] | [hungry] [share] [gift] [close]~
        [start] | [fear] [sorrow] | [courage] [over] [close]~
        [start] | [arrival] [stuck] | [lever] [gift] [close]~
        [start] | [broken] [sorrow] | [arrival] [mended] [gift] [close]~
        [start] | [hiding] [sorrow] | [surprise] [gift] [close]~
        [start] | [arrival] [plan] | [spoiled] [shelter] [gift] [close]~
        [start] | [wish] [sorrow] | [arrival] [mastery] [gift] [close]~
        [start] | [alone] [hello] | [gift] [close]~
        [start] | [promise] [arrival] [plan] | [duty] [gift] [close]~
        [start] | [sowing] [waiting] | [harvest] [arrival] [gift] [close]~
        [start] | [desire] [trade] | [bargain] [close]~
        [start] | [baby] [sorrow] [comfort] | [mother] [close]~
        """
    ),
}
