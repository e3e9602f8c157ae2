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
        """Ada, Amy, Bea, Beth, Cleo, Dora, Ella, Eva, Fay, Flo, Gwen, Hana, Ida, Iris, Ivy, Jane, June, Kate, Kim, Lily,
        Lucy, Mara, Mia, Nell, Nora, Olga, Opal, Pia, Polly, Rosa, Ruby, Sue, Tess, Tina, Una, Vera, Wilma, Wren, Yara, Zoe"""
    ),
    "boy": _listed(
        """Abe, Adam, Ben, Bob, Carl, Dan, Drew, Eli, Emil, Finn, Fred, Gus, Glen, Hal, Hugo, Ian, Ivan, Jack, Jon, Kai, Ken,
        Leo, Luke, Max, Milo, Ned, Noah, Omar, Otto, Paul, Pete, Rex, Sam, Sid, Tim, Tom, Umar, Vic, Will, Zack"""
    ),
    "animal": _listed(
        """ant, ape, badger, bat, bear, bee, bull, cat, cow, crab, crow, deer, dog, donkey, duck, eel, elk, fish, fox, frog, goat,
        goose, hare, hawk, hen, horse, jay, koala, lamb, lion, llama, mole, mouse, mule, newt, otter, owl, ox, panda, parrot,
        pig, pony, quail, rabbit, rat, raven, robin, seal, sheep, skunk, snail, snake, stork, swan, tiger, toad, turtle, vole,
        wasp, weasel, wolf, worm, yak, zebra"""
    ),
    "trait": _listed(
        """bold, brave, busy, calm, clever, clumsy, curious, dreamy, eager, fluffy, friendly, gentle, grumpy, happy, hungry, jolly,
        kind, lazy, lively, lonely, loud, merry, messy, noisy, patient, playful, polite, proud, quick, quiet, restless, shy,
        silly, sleepy, smart, stubborn, timid, wild, wise, young"""
    ),
    "thing": _listed(
        """apron, ball, basket, bell, belt, book, boot, bowl, box, broom, brush, clock, coat, comb, cup, dish, doll, drum, fan,
        flag, flute, fork, glove, hammer, hat, hook, horn, jar, jug, kettle, key, kite, lamp, map, mask, mug, net, oar, pail,
        pan, pen, pillow, pipe, pot, puppet, quilt, rake, ring, rope, saw, scarf, shell, spoon, stool, teapot, tent, top, tray,
        umbrella, vase, wand, whistle, wig, yo-yo"""
    ),
    "foods": _listed(
        """
        apples, apricots, bagels, beans, berries, biscuits, buns, cakes, carrots, cherries, chestnuts,
        cookies, crackers, dates, dumplings, eggs, figs, grapes, jam tarts, kiwis, leeks, lemons, limes,
        mangoes, melons, muffins, nuts, olives, onions, pancakes, peaches, pears, peas, pies, plums,
        potatoes, pretzels, pumpkins, radishes, rolls, sandwiches, scones, tomatoes, turnips, waffles,
        walnuts, yams
        """
    ),
    "fun": _listed(
        """balloons, beads, bells, boats, books, bugs, cards, castles, chess, clay, clouds, coins, dolls, dragons, drums, elves,
        ferns, games, ghosts, hats, ice, jokes, kites, knots, ladders, maps, marbles, masks, mud, music, paint, poems, puddles,
        puzzles, riddles, rivers, sand, shells, ships, snow, songs, stars, stones, tea, trains, trees, whales, yarn"""
    ),
    "stuff": _listed(
        """bark, boards, bricks, canvas, cloth, cork, felt, flour, foil, glue, grass, gravel, hay, ink, lace, leaves, moss, nails,
        oil, paper, pegs, planks, rags, reeds, sand, string, tape, tin, twigs, wax, wire, wool"""
    ),
    "good": _listed(
        """amazed, brave, bright, calm, cheerful, cozy, eager, fine, free, glad, great, happy, hopeful, jolly, keen, lucky, merry,
        loved, nice, peaceful, perky, pleased, proud, rested, safe, smart, snug, strong, sure, thrilled, warm, wise"""
    ),
    "bad": _listed(
        """afraid, alone, angry, awful, bitter, blue, cold, cross, dizzy, faint, gloomy, glum, grim, hurt, ill, jumpy, lonely, lost,
        mad, nervous, numb, poor, sad, shaky, sick, small, sore, sorry, tired, upset, weak, worried"""
    ),
    "dismay": _listed(
        """Alas, Boo, Dear me, Drat, Gosh, Help, How awful, Mercy, Not again, Oh no, Oops, Ouch, Rats, Ugh, What now, Yikes"""
    ),
    "joy": _listed(
        """Aha, Bravo, Cheers, Done, Finally, Good, Hooray, I did it, Just look, Lovely, Magic, Perfect, Super, What fun, Wow, Yes"""
    ),
    "skill": _listed(
        """bake bread, climb trees, dance, dive, fish, ice-skate, juggle, knit, milk a cow, paint, play chess, read, ride a pony,
        row, sew, ski, swim, tie knots, walk on stilts, whistle"""
    ),
    "weather": _listed("fog, frost, hail, lightning, mist, rain, sleet, snow, thunder, wind"),
    "cart": _listed("barrow, boat, bus, cart, raft, sled, tractor, truck, van, wagon"),
}

# Lists whose words may come back: those that describe.
DESCRIPTIONS = {
    "number": tuple(str(number) for number in range(2, 100)),
    "adj": _listed(
        """
        big, broad, bumpy, clean, cold, cool, crooked, curly, cute, damp, dark, dry, dull, dusty, famous,
        fancy, fat, fine, flat, fresh, frozen, funny, fuzzy, giant, good, grand, great, heavy, hot, huge,
        icy, jumbo, knobby, large, light, little, long, lovely, lucky, magic, mighty, muddy, narrow, neat,
        new, nice, odd, old, perfect, plain, pretty, quaint, rare, rough, round, shiny, short, simple,
        slim, small, smooth, soft, special, spotted, square, sticky, strange, striped, sturdy, sweet, tall,
        thick, thin, tiny, ugly, warm, wet, wide
        """
    ),
    "color": _listed(
        """
        amber, aqua, beige, black, blue, bronze, brown, coral, cream, crimson, gold, gray, green, indigo,
        ivory, lilac, mint, navy, orange, pink, purple, red, rose, ruby, scarlet, silver, tan, teal,
        turquoise, violet, white, yellow
        """
    ),
    "day": _listed(
        """breezy, bright, chilly, clear, cloudy, cold, cool, damp, dry, dull, fine, foggy, frosty, golden, gray, hazy, hot, lazy,
        mild, misty, quiet, rainy, snowy, still, stormy, sunny, warm, wet, windy"""
    ),
    "place": _listed(
        """arch, bank, barn, bench, boulder, bridge, brook, cabin, castle, cave, church, cliff, dam, dock, elm, farm, fence, fort,
        garden, gate, grove, hedge, hill, house, hut, inn, kiln, lake, ledge, mill, mine, oak, orchard, palace, park, pier, pine,
        pond, pump, quarry, reef, river, rock, school, shed, shop, stable, statue, stump, swamp, temple, tower, tree, tunnel,
        valley, wall, well, willow, yard, zoo"""
    ),
    "near": ("behind", "beside", "by", "near", "past"),
    "went": _listed(
        """came, crept, danced, hiked, hopped, hurried, jogged, marched, raced, ran, rode, rushed, skipped, strolled, tiptoed,
        trotted, walked, went"""
    ),
    "said": _listed("called, cried, gasped, laughed, mumbled, said, sang, shouted, whispered, yelled"),
    "how": _listed(
        """boldly, bravely, calmly, eagerly, firmly, gently, gladly, happily, kindly, loudly, merrily, neatly, nicely,
        politely, proudly, quickly, quietly, shyly, slowly, softly, sweetly, warmly, wisely"""
    ),
}
