"""The word lists of the built-in stories: names, animals, things, places, feelings.

How they meet is in `story_plots`. The words are short, and most differ from all others within a few letters,
so that a small model learns them soon.
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
        ant, ape, badger, bat, bear, bee, bug, bull, camel, cat, cow, crab, crow, deer, dog, dove, duck,
        eel, elk, fish, fox, frog, goat, goose, hare, hawk, hen, horse, jay, koala, lamb, lion, llama,
        mole, moose, mouse, mule, newt, otter, owl, ox, panda, parrot, pig, pony, quail, rabbit, rat,
        raven, robin, seal, sheep, skunk, snail, snake, stork, swan, tiger, toad, turtle, weasel, wolf,
        yak, zebra
        """
    ),
    "trait": _listed(
        """
        bold, brave, bright, busy, calm, cheery, clever, cool, curious, eager, friendly, funny, gentle,
        glad, happy, hopeful, jolly, keen, kind, lively, loud, merry, mighty, noisy, patient, perky,
        playful, polite, proud, quick, quiet, shy, silly, smart, strong, wild, wise, witty
        """
    ),
    "thing": _listed(
        """
        apron, ball, basket, bed, bell, belt, book, boot, bow, box, broom, brush, bucket, button, can,
        chair, clock, coat, comb, cup, dish, doll, drum, fan, flag, flute, fork, glove, hammer, hat, hook,
        horn, jar, jug, kettle, key, kite, lamp, map, mask, mug, net, oar, pail, pan, pen, pillow, pipe,
        pot, puppet, quilt, rake, ring, rope, saw, scarf, shoe, spoon, stool, tent, top, vase, whistle, wig
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
    "bad": _listed(
        """
        afraid, alone, angry, awful, bitter, blue, cross, dizzy, faint, gloomy, glum, grim, hurt, ill,
        jumpy, lonely, lost, mad, nervous, numb, poor, sad, shaky, sick, small, sore, sorry, tearful,
        tired, upset, weak, weary
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
}

# Lists whose words may come back: those that describe.
DESCRIPTIONS = {
    "number": tuple(str(number) for number in range(2, 100)),
    "adj": _listed(
        """
        bent, big, black, blue, brown, clean, cold, cool, cute, dark, dry, dull, dusty, fancy, fat, fine,
        flat, fresh, gold, good, gray, green, heavy, hot, huge, icy, large, light, little, long, lovely,
        lucky, magic, muddy, neat, new, nice, odd, old, pale, pink, plain, pretty, purple, rare, red,
        round, shiny, short, silver, slim, small, soft, strange, tall, tan, thin, tiny, ugly, warm, wet,
        white, wide, yellow
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
        arch, bank, barn, beach, bench, boat, bridge, brook, bush, cabin, canal, castle, cave, church,
        cliff, creek, dam, dock, elm, farm, fence, field, fort, garden, gate, grove, hedge, hill, house,
        hut, inn, island, kiln, lake, ledge, log, mill, mine, oak, orchard, palace, park, path, pier, pine,
        pond, pump, quarry, reef, river, rock, school, shed, shop, stable, statue, stump, tower, tree,
        tunnel, wall, well, yard, zoo
        """
    ),
    "near": _listed("behind, by, near, past"),
    "went": _listed(
        """
        came, crept, danced, hiked, hopped, jogged, marched, raced, ran, rode, rushed, skipped, strolled,
        trotted, walked, went
        """
    ),
    "said": _listed("called, cried, exclaimed, gasped, said, shouted, squeaked, yelled"),
    "how": _listed(
        """
        bravely, calmly, eagerly, firmly, gently, gladly, happily, kindly, neatly, nicely, politely,
        proudly, quickly, shyly, slowly, warmly
        """
    ),
}
