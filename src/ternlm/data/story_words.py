"""The word lists of the built-in stories: names, animals, things, places, feelings. How they meet is in `story_plots`.

The words are short, and most differ from all others within three letters, so that a small model learns them soon.
"""


def _listed(text: str) -> tuple[str, ...]:
    """Split a comma-separated list, whose items may span lines."""
    return tuple(" ".join(item.split()) for item in text.split(","))


_SHE = {"he": "she", "He": "She", "him": "her", "his": "her", "His": "Her", "child": "girl"}
_HE = {"he": "he", "He": "He", "him": "him", "his": "his", "His": "His", "child": "boy"}

FIELDS = {"girl": _SHE, "boy": _HE}

# Lists whose words appear at most once in a story.
WORDS = {
    "girl": _listed(
        """
        Ada, Amy, Bea, Cleo, Dora, Ella, Eva, Fay, Flo, Gwen, Hana, Ida, Ivy, Jane, June, Kate, Lily, Lucy,
        Mia, Nell, Nora, Olga, Pia, Rosa, Ruby, Sue, Tess, Una, Vera, Wren, Yara, Zoe
        """
    ),
    "boy": _listed(
        """
        Abe, Adam, Ben, Bob, Carl, Dan, Eli, Finn, Fred, Gus, Hal, Hugo, Ian, Ivan, Jack, Jon, Kai, Ken,
        Leo, Luke, Max, Ned, Noah, Omar, Otto, Paul, Rex, Sam, Tim, Tom, Vic, Will
        """
    ),
    "animal": _listed(
        """
        ant, ape, bat, bear, bee, bull, cat, cow, crab, crow, deer, dog, dove, duck, eel, elk, fish, fox,
        frog, goat, goose, hare, hawk, hen, horse, jay, koala, lamb, lion, mole, mouse, newt, otter, owl,
        ox, panda, pig, pony, rabbit, rat, seal, sheep, snail, swan, tiger, toad, wolf, yak
        """
    ),
    "trait": _listed(
        """
        bold, brave, busy, calm, clever, curious, eager, funny, gentle, grumpy, happy, hungry, jolly, kind,
        lazy, lonely, loud, merry, messy, noisy, polite, proud, quick, quiet, shy, silly, sleepy, smart,
        timid, wild, wise, young
        """
    ),
    "thing": _listed(
        """
        ball, bed, bell, belt, book, boot, bow, box, broom, can, chair, clock, coat, cup, dish, doll, drum,
        fan, flag, flute, fork, hat, hook, horn, jar, jug, key, kite, lamp, map, mask, mug, net, oar, pan,
        pen, pipe, pot, quilt, ring, rope, saw, shoe, tent, top, toy, vase, wig
        """
    ),
    "foods": _listed(
        """
        apples, beans, beets, buns, cakes, chips, dates, eggs, figs, grapes, hams, jams, kiwis, leeks,
        lemons, limes, melons, muffins, nuts, olives, onions, pears, peas, pies, plums, radishes, rolls,
        tarts, turnips, waffles, wraps, yams
        """
    ),
    "fun": _listed(
        """
        art, beads, bells, boats, bugs, cards, chess, clay, coins, dolls, drums, elves, games, ghosts,
        hats, ice, jokes, kites, knots, maps, mud, music, paint, poems, rain, sand, ships, snow, songs,
        stars, trains, yarn
        """
    ),
    "stuff": _listed(
        """
        bark, cloth, cork, felt, foam, foil, glue, grass, hay, ink, lace, leaves, moss, nails, oil, paper,
        pegs, rags, reeds, string, tape, twigs, wax, wool
        """
    ),
    "good": _listed(
        """
        brave, bright, calm, cozy, eager, fine, free, glad, great, happy, jolly, keen, lucky, merry, nice,
        pleased, proud, rested, safe, snug, strong, sure, warm, wise
        """
    ),
    "bad": _listed(
        """
        afraid, alone, angry, awful, blue, cold, cross, dizzy, faint, glum, grim, hurt, ill, jumpy, lost,
        mad, numb, poor, sad, sick, sore, tired, upset, weak
        """
    ),
    "dismay": _listed(
        """
        Alas, Boo, Dear me, Drat, Gosh, Help, How awful, Mercy, Not again, Oh no, Oops, Ouch, Rats, Ugh,
        What now, Yikes
        """
    ),
    "joy": _listed(
        """
        Aha, Bravo, Cheers, Done, Finally, Good, Hooray, Just look, Lovely, Magic, Perfect, Super, Thanks,
        What fun, Wow, Yes
        """
    ),
    "skill": _listed(
        """
        climb, cook, dance, dive, fish, juggle, knit, paint, read, row, sew, skate, ski, spell, swim,
        whistle
        """
    ),
    "weather": _listed("fog, frost, hail, mist, rain, sleet, snow, wind"),
    "cart": _listed("bike, boat, bus, cart, raft, sled, truck, van"),
}

# Lists whose words may come back: those that describe.
DESCRIPTIONS = {
    "number": tuple(str(number) for number in range(2, 100)),
    "minute": tuple(str(minute) for minute in range(10, 60)),
    "morning": tuple(str(hour) for hour in range(6, 12)),
    "afternoon": ("12", "1", "2", "3", "4", "5"),
    "adj": _listed(
        """
        bent, big, clean, cold, cool, cute, damp, dark, dry, dull, dusty, fancy, fat, fine, flat, fresh,
        giant, good, grand, heavy, hot, huge, icy, jumbo, large, light, little, long, lovely, lucky, magic,
        muddy, neat, new, nice, odd, old, plain, pretty, rare, rough, round, shiny, short, simple, slim,
        small, soft, strange, tall, thin, tiny, ugly, warm, wet, wide
        """
    ),
    "color": _listed(
        """
        amber, black, blue, brown, coral, cream, gold, gray, green, ivory, lilac, mint, navy, orange, pink,
        purple, red, rose, silver, tan, teal, violet, white, yellow
        """
    ),
    "day": _listed(
        """
        bright, chilly, clear, cloudy, cold, cool, dry, foggy, frosty, gray, hot, lazy, misty, rainy,
        snowy, still, stormy, sunny, warm, windy
        """
    ),
    "place": _listed(
        """
        arch, bank, barn, bench, bridge, brook, cabin, cave, church, cliff, dam, dock, elm, farm, fence,
        fort, garden, gate, hedge, hill, house, hut, inn, kiln, lake, ledge, mill, mine, oak, orchard,
        palace, park, pier, pond, pump, reef, river, rock, school, shed, shop, stable, tower, tree, wall,
        well, yard, zoo
        """
    ),
    "near": _listed("behind, by, near, past"),
    "went": _listed(
        """
        came, crept, danced, hiked, hopped, jogged, marched, raced, ran, rode, rushed, skipped, strolled,
        trotted, walked, went
        """
    ),
    "said": _listed("called, cried, gasped, laughed, said, sang, shouted, yelled"),
    "how": _listed(
        """
        bravely, calmly, eagerly, firmly, gently, gladly, happily, kindly, loudly, neatly, politely,
        proudly, quickly, shyly, slowly, warmly
        """
    ),
}
