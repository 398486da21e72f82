"""The prompts to start with for a real teacher: 500, ours, varied by subject, motion, camera and light.

    python -m tiedquiet.distill.prompts > my-prompts.txt

They are put together from the words below, which were written for this; nothing was taken from anybody's list. Each of
the 50 scenes is a subject with what it can do and where, and gives ten prompts. Its motions and places, and over all
scenes the cameras and the lights that go with a place, are dealt out in turn from a shuffled pack, so that each is used
about equally often. The same seed gives the same list. `prompts.txt` beside this file is what it prints.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import product

PER_SCENE = 10
CAMERAS = [
    "The camera stands still.",
    "The camera follows at a steady distance.",
    "The camera moves slowly closer.",
    "The camera draws back and shows more and more of the place.",
    "The camera circles to the left.",
    "The camera glides past from right to left.",
    "The camera rises and looks down from above.",
    "Seen from far above, straight down.",
    "A low camera, close to the ground.",
    "A close-up with a blurred background.",
    "A wide shot.",
    "A handheld camera that sways a little.",
    "The camera pans from left to right.",
    "The camera tilts up from the ground.",
]
LIGHTS = {
    "outdoors": [
        "First light of dawn.", "Low golden sun.", "Hard light at noon.", "A grey, overcast sky.", "Thin morning fog.",
        "The blue hour after sunset.", "Moonlight.", "Sun and quick shadows of clouds.", "Light rain.",
        "Against the setting sun.",
    ],
    "indoors": [
        "Soft light from a window.", "A single lamp.", "Candlelight.", "Bright white light from above.",
        "Coloured neon light.", "Sunbeams and dust in the air.", "Warm evening light.", "Half in shadow.",
    ],
    "under water": [
        "Sunbeams reach down through clear water.", "Deep blue, dim light.", "The light ripples over the ground.",
        "Murky green water.",
    ],
}  # fmt: skip
# What a scene is of; what it can do; where, and by which kind of light.
SCENES: list[tuple[str, list[str], list[str], str]] = [
    # People.
    ("An old fisherman", ["hauls in a heavy net", "coils a wet rope", "rows with long strokes"],
     ["in a small wooden boat on a lake", "in a boat near a rocky coast"], "outdoors"),
    ("A girl in a yellow raincoat", ["jumps into puddles", "runs with her arms spread", "spins around"],
     ["on a village street", "in a park with tall trees"], "outdoors"),
    ("A baker", ["kneads a large piece of dough", "dusts a table with flour", "slides loaves into the oven"],
     ["in a small bakery"], "indoors"),
    ("A dancer in a red dress", ["turns faster and faster", "leaps across the floor", "sinks slowly to her knees"],
     ["on an empty stage", "in a studio with a wall of mirrors"], "indoors"),
    ("A violinist with grey hair", ["plays a fast piece", "plays with closed eyes and sways", "tunes his violin"],
     ["in a crowded cafe", "in a bare rehearsal room"], "indoors"),
    ("Two children", ["fly a kite", "roll down a slope", "race each other"],
     ["on a green hill", "on a wide beach"], "outdoors"),
    ("A woman with short black hair", ["turns her head and smiles", "laughs and brushes hair from her face",
     "drinks from a cup and looks up"], ["at a kitchen table", "in a bookshop"], "indoors"),
    ("A man in a dark coat", ["walks against the wind", "waves down a taxi", "opens an umbrella"],
     ["on a busy city street", "on a bridge over a river"], "outdoors"),
    ("A skateboarder", ["jumps over a bench", "rolls down a ramp", "turns in a tight curve"],
     ["in a concrete skate park", "on an empty square"], "outdoors"),
    ("A potter", ["shapes a tall vase on the wheel", "presses her thumbs into wet clay", "lifts a bowl off the wheel"],
     ["in a workshop full of shelves"], "indoors"),
    ("A climber", ["pulls herself over an edge", "reaches for the next hold", "swings on her rope"],
     ["on a steep granite wall", "on red sandstone"], "outdoors"),
    ("A street musician", ["beats a pair of buckets with sticks", "plays the accordion and taps his foot",
     "sings and claps"], ["beside a fountain", "at the corner of a market"], "outdoors"),
    ("A blacksmith", ["hammers a glowing piece of iron", "pulls a blade from the fire", "dips hot iron into water"],
     ["in a dark smithy"], "indoors"),
    ("A diver", ["swims past a coral reef", "follows a turtle", "drops something that sinks slowly"],
     ["in the open sea", "near a sunken ship"], "under water"),
    ("A cyclist", ["rides uphill out of the saddle", "races around a bend", "brakes and puts a foot down"],
     ["on a mountain road", "on a path between fields"], "outdoors"),
    ("A chef", ["tosses vegetables in a pan", "chops herbs very fast", "pours sauce over a plate"],
     ["in a busy restaurant kitchen"], "indoors"),
    ("A crowd", ["cheers and waves flags", "crosses in all directions", "opens its umbrellas"],
     ["on a large square", "at a city crossing"], "outdoors"),
    ("Two fencers in white", ["cross their blades and part", "lunge at the same time", "circle each other"],
     ["in an old gymnasium"], "indoors"),
    # Animals.
    ("A brown horse", ["gallops", "shakes its mane", "rears and drops back"],
     ["through shallow water", "across a meadow"], "outdoors"),
    ("A border collie", ["leaps to catch a disc", "shakes water from its fur", "runs towards the camera"],
     ["on a lawn", "on a wet beach"], "outdoors"),
    ("A grey cat", ["stretches and yawns", "stalks a ball of wool", "jumps onto a shelf"],
     ["in a living room", "in a sunlit attic"], "indoors"),
    ("A hummingbird", ["hovers and drinks", "darts from flower to flower", "turns in the air"],
     ["in front of red blossoms"], "outdoors"),
    ("A herd of elephants", ["wades across a river", "walks in a line and raises dust", "sprays itself with water"],
     ["in the savanna"], "outdoors"),
    ("A fox", ["trots and stops to listen", "dives head first into the snow", "slips between the trunks"],
     ["in a snowy forest", "at the edge of a white field"], "outdoors"),
    ("A swarm of silver fish", ["turns all at once", "parts around a shark", "twists into a ball"],
     ["in the open sea", "above a sandy ground"], "under water"),
    ("A jellyfish", ["pulses upwards", "drifts with trailing arms", "opens and closes like a flower"],
     ["in the deep sea"], "under water"),
    ("A humpback whale", ["rises and breathes out", "rolls onto its side", "dives with a raised tail"],
     ["beneath the surface of the sea"], "under water"),
    ("An eagle", ["takes off with heavy strokes", "circles without a stroke", "snatches a fish"],
     ["over a mountain lake"], "outdoors"),
    ("Flamingos", ["wade with slow steps", "take off one after another", "dip their heads"],
     ["in a shallow pink lake"], "outdoors"),
    ("A chameleon", ["takes a slow step", "shoots out its tongue", "rolls its eyes"],
     ["on a thin branch"], "outdoors"),
    ("A panda", ["chews on bamboo", "tumbles down a slope", "scratches its back on a tree"],
     ["in a bamboo forest"], "outdoors"),
    ("A spider", ["spins its web", "climbs up a thread", "waits and then rushes out"],
     ["between two twigs with dew"], "outdoors"),
    # What drives, sails and flies.
    ("A red sports car", ["drifts around a bend", "speeds away from the camera", "splashes through a puddle"],
     ["on a coastal road", "on a mountain pass"], "outdoors"),
    ("A steam train", ["crosses a stone bridge", "starts with clouds of steam", "comes out of a tunnel"],
     ["in a green valley", "in a snowy valley"], "outdoors"),
    ("A sailing boat", ["leans over in the wind", "cuts through high waves", "drops its sails"],
     ["off a rocky coast", "on a wide bay"], "outdoors"),
    ("Hot-air balloons", ["rise one by one", "drift past each other", "sink behind a ridge"],
     ["over a land of bare rocks", "over fields"], "outdoors"),
    ("A yellow tram", ["climbs a steep street", "turns a corner", "stops and opens its doors"],
     ["in an old town"], "outdoors"),
    ("A small robot on wheels", ["rolls over cables", "lifts a box with its arm", "turns its head and blinks"],
     ["in a workshop", "in a long white corridor"], "indoors"),
    ("A rocket", ["lifts off on a column of fire", "rises through a layer of clouds", "lands upright in dust"],
     ["in a desert"], "outdoors"),
    # Nature.
    ("Waves", ["break and run up", "crash and throw up spray", "draw back over pebbles"],
     ["on a black beach", "at the foot of a lighthouse"], "outdoors"),
    ("A waterfall", ["plunges into a pool", "falls in thin veils", "throws up spray with a rainbow"],
     ["in a rainforest", "between mossy rocks"], "outdoors"),
    ("Clouds", ["race over the peaks", "tower up and grow dark", "pour over a ridge like water"],
     ["in high mountains"], "outdoors"),
    ("A field of sunflowers", ["sways in gusts of wind", "turns to the sun in time lapse", "bends under rain"],
     ["beneath a wide sky"], "outdoors"),
    ("Lava", ["creeps forward and cracks", "spurts into the air", "flows into the sea and steams"],
     ["on the slope of a volcano"], "outdoors"),
    ("Autumn leaves", ["whirl up from the ground", "fall slowly", "drift down a stream"],
     ["in a beech forest", "in a park with benches"], "outdoors"),
    # Things.
    ("Ink", ["spreads in curling clouds", "sinks in a thin thread", "meets ink of another colour"],
     ["in a glass of clear water"], "indoors"),
    ("A candle", ["flickers in a draught and steadies", "is blown out and smokes", "drips wax onto the wood"],
     ["on an old table"], "indoors"),
    ("A row of dominoes", ["falls one after another", "topples in a spiral", "falls and rings a small bell"],
     ["on a wooden floor"], "indoors"),
    ("Coffee", ["pours into a white cup", "swirls together with milk", "steams while a spoon stirs it"],
     ["on a marble counter"], "indoors"),
    ("A music box", ["opens and a figure begins to turn", "slows down and stops", "is wound up by a hand"],
     ["on a velvet cloth"], "indoors"),
]  # fmt: skip


def dealt(pack: Sequence[str], chance: random.Random) -> Iterator[str]:
    """The cards of a shuffled pack, shuffled again whenever all are dealt."""
    while True:
        yield from chance.sample(pack, len(pack))


def prompts(seed: int = 0) -> list[str]:
    """All of them, scene by scene."""
    chance = random.Random(seed)
    cameras, lights = dealt(CAMERAS, chance), {kind: dealt(pack, chance) for kind, pack in LIGHTS.items()}
    made: dict[str, None] = {}
    for subject, motions, places, kind in SCENES:
        what = dealt([f"{subject} {motion} {place}." for motion, place in product(motions, places)], chance)
        last = len(made) + PER_SCENE
        while len(made) < last:  # the same twice is told once
            made[f"{next(what)} {next(cameras)} {next(lights[kind])}"] = None
    return list(made)


if __name__ == "__main__":
    print("\n".join(prompts()))
