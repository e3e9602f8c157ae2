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
    "where": ("the [adj] [place]",),
    "spot": ("[near] the [adj] [place]",),
    "item": ("[a adj] [color] [thing]",),
    "food": ("[number] [adj] [foods]",),
    "dream": ("[color] [fun]",),
    "scrap": ("[color] [stuff]",),
    "toys": ("[item] and [item]", "[item], [item] and [item]"),
    "meal": ("[food] and [food]", "[food], [food] and [food]"),
    "items": ("[item] and [food]", "[food] and [item]"),
    "close": ("[glad] [last]", "[glad]", "[last]"),
}

SENTENCES = {
    # The hero and an outing.
    "start": _lines(
        """
        At [morning]:[minute] one [day] day, [who], [a trait] [kind], [went] to [where] with [items].
        "What [a day] day!" [said] [who], [a trait] [kind]. At [morning]:[minute], {h.he} [went] to [where] with [items].
        [who] was [a trait] [kind] who loved [dream], [dream] and [dream]. One [day] day, {h.he} [went] to [where] with [items].
        At [number] [^place] Road lived [who], [a trait] [kind]. One [day] day, {h.he} [went] to [where] with [items].
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
        At [afternoon]:[minute], [friend], [a trait] [someone], [went] by with [items].
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
        That night {h.he} dreamed of [dream], [dream] and [dream].
        For supper there were [meal].
        On the way home, {h.he} sang about [dream], [dream] and [dream].
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
    "lost": ("But [spot], {h.his} [adj] [color] [thing:t] was gone!",),
    "search": ("{h.He} looked [spot], [spot] and [spot], but found only [items].",),
    "found": ('"Your {t} is [spot]!" [said] {f} [how].',),
    # Sharing.
    "hunger": ("At [afternoon]:[minute], {h.he} sat down [spot] to eat [meal].",),
    "hungry": ('Then {h.he} met [friend], [a trait] [someone]. "I have only [food]," [said] {f}.',),
    "share": ("{h} [how] gave {f} [meal].",),
    # A fear overcome.
    "fear": ("But to get home, {h.he} had to pass [a trait] [color] [animal] [spot].",),
    "courage": ("{h} [how] held [item] and [item] and took [number] steps.",),
    "over": ("It was no worse than [a trait] [animal] with [items].",),
    # A cart that is stuck.
    "stuck": ("{f.His} [adj] [color] [cart:t] was stuck [spot]. They took out [items], but it did not move.",),
    "lever": ("{h} [how] put [scrap], [scrap] and [scrap] under the {t}, and out it came!",),
    # A broken thing mended.
    "broken": ("But [spot], {h.his} [adj] [color] [thing:t] fell apart.",),
    "mended": ("They [how] mended the {t} with [scrap], [scrap] and [scrap].",),
    # A surprise.
    "hiding": ("But everyone hid, one [spot], one [spot] and one [spot].",),
    "surprise": ('"Surprise!" [said] [friend], [a trait] [someone]. It was {h.his} birthday!',),
    # The weather spoils a plan.
    "plan": ('"Come and play with [toys]!" [said] {f}.',),
    "spoiled": ("But then came [weather], [weather] and [weather].",),
    "shelter": ("They [went] into [where] and made a fort from [scrap], [scrap] and [scrap].",),
    # A skill learned.
    "wish": ("{h.He} wanted to [skill:t]. {h.He} tried it with [item] and with [item], but fell down.",),
    "mastery": ("After [number] days, {h} could {t} like [a trait] [animal].",),
    # A new friend.
    "alone": ("[^spot] sat [friend], [a trait] [someone], [bad] and [bad].",),
    "hello": ('"Do you like [dream]?" [said] {h}. "No," [said] {f}, "but I like [dream] and [dream]."',),
    # A promise kept.
    "promise": ("But {h.he} had promised to bring [food] to [where].",),
    "duty": ("But {h} [how] kept {h.his} promise and came back with [items].",),
    # Seeds.
    "sowing": ("[^spot], {h.he} [how] planted [number] [color] seeds.",),
    "waiting": ("{h.He} put [scrap] and [scrap] around them and waited [number] days.",),
    "harvest": ("Then one [day] day there were [meal].",),
    # A trade.
    "desire": ("{h.He} wanted [a adj] [color] [thing:t] but had only [item].",),
    "trade": ("{h} traded it for [item], that for [item], and that for [food].",),
    "bargain": ("At last {h} traded [food] and [item] for the {t}.",),
    # A lost baby animal.
    "baby": ("[^spot] sat a baby [animal], [bad] and [bad].",),
    "comfort": ("{h} [how] gave it [meal].",),
    "mother": ("At [afternoon]:[minute], its mother [went] by with [items].",),
    # The plots, paragraph by paragraph.
    "story": _lines(
        """
        [start] | [lost] [sorrow] [search] | [arrival] [found] [gift] [close]~
        [start] | [hunger] [hungry] | [share] [gift] [close]~
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
