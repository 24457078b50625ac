"""The 80 object classes of COCO and the words that captions use for them.

Class names are COCO's. The words are our own list of ordinary synonyms and kinds; plurals are formed by
rule. A phrase in `NOT_OBJECTS` contains a word for an object but does not mean one.
"""

# class -> further words, separated by commas
_SYNONYMS = """
person: man, woman, boy, girl, child, kid, baby, toddler, infant, adult, people, guy, lady, gentleman,
  player, rider, surfer, skier, snowboarder, skateboarder, skater, pedestrian, worker, chef, waiter,
  waitress, driver, passenger, cyclist, biker, motorcyclist, batter, pitcher, catcher, umpire, officer,
  policeman, policewoman, soldier, farmer, student, teacher, bride, groom, crowd, family, couple, friend,
  human, someone, somebody, athlete, performer, photographer, tourist, shopper, vendor, customer, teenager,
  youth, male, female, father, mother, son, daughter, brother, sister, spectator, swimmer, jockey
bicycle: bike, cycle, unicycle
car: automobile, sedan, suv, taxi, cab, minivan, van, jeep, hatchback, limousine, station wagon
motorcycle: motorbike, scooter, moped, motor bike, motor cycle
airplane: plane, aeroplane, jet, aircraft, airliner, jetliner, biplane
bus: minibus, trolleybus, coach
train: locomotive, tram, subway, caboose, trolley car, streetcar
truck: pickup, lorry, semi, firetruck, fire engine, tractor trailer, dump truck
boat: ship, sailboat, canoe, kayak, ferry, yacht, rowboat, vessel, dinghy, raft, gondola, speedboat
traffic light: stoplight, stop light, traffic signal, street light signal, traffic lamp
fire hydrant: hydrant
stop sign: street sign stop
parking meter: meter
bench: pew
bird: pigeon, seagull, gull, duck, duckling, goose, swan, parrot, owl, eagle, hawk, crow, raven, chicken,
  hen, rooster, turkey, penguin, flamingo, ostrich, peacock, pelican, heron, stork, sparrow, robin, dove,
  hummingbird, woodpecker, finch, parakeet, cockatoo, vulture, egret, crane bird
cat: kitten, kitty, feline, tabby
dog: puppy, pup, hound, poodle, terrier, dachshund, labrador, retriever, bulldog, husky, beagle, collie,
  chihuahua, dalmatian, corgi, pug, canine, doggy, sheepdog
horse: pony, foal, colt, mare, stallion
sheep: lamb, ram, ewe
cow: bull, calf, cattle, ox, heifer, steer
elephant:
bear: panda, polar bear, grizzly, cub
zebra:
giraffe:
backpack: rucksack, knapsack, back pack, book bag
umbrella: parasol
handbag: purse, pocketbook, hand bag
tie: necktie, bow tie, bowtie
suitcase: luggage, baggage, suit case
frisbee: flying disc, flying disk
skis: ski
snowboard: snow board
sports ball: ball, soccer ball, tennis ball, baseball ball, basketball, football, volleyball, beach ball
kite:
baseball bat: bat
baseball glove: mitt, catcher 's mitt, baseball mitt
skateboard: skate board, longboard
surfboard: surf board, boogie board, body board, bodyboard
tennis racket: racket, racquet, tennis racquet
bottle: wine bottle, beer bottle, water bottle
wine glass: wineglass, goblet, champagne glass, champagne flute
cup: mug, teacup, coffee cup
fork:
knife: pocketknife, butter knife, pocket knife
spoon: teaspoon, tablespoon
bowl: mixing bowl
banana: plantain
apple:
sandwich: burger, hamburger, cheeseburger, sub, panini, hoagie, burrito wrap
orange: tangerine, clementine
broccoli:
carrot:
hot dog: hotdog, frankfurter, corn dog
pizza: calzone
donut: doughnut
cake: cupcake, cheesecake, coffeecake, shortcake
chair: stool, armchair, recliner, seat, rocking chair, high chair, folding chair
couch: sofa, loveseat, futon, settee
potted plant: houseplant, house plant, flowerpot, pot plant, plant pot, potted flower
bed: mattress, bunk bed, cot
dining table: table, desk, coffee table, kitchen table, picnic table
toilet: urinal, commode, lavatory
tv: television, tv screen, monitor, television set, flat screen, flatscreen
laptop: notebook computer, laptop computer, macbook
mouse: computer mouse
remote: remote control, wii remote, wiimote
keyboard: computer keyboard
cell phone: cellphone, phone, mobile phone, smartphone, smart phone, telephone, iphone, mobile
microwave: microwave oven
oven: stove, stove top, stovetop, stove top oven, range oven
toaster: toaster oven
sink: washbasin, basin
refrigerator: fridge, freezer, icebox
book: novel, textbook, cookbook, paperback
clock: watch, wristwatch, alarm clock, clock tower clock
vase: urn
scissors: shears, scissor
teddy bear: teddy, stuffed bear, teddybear, stuffed animal bear
hair drier: hair dryer, hairdryer, blow dryer, blow drier, blowdryer
toothbrush: tooth brush
"""

NOT_OBJECTS = frozenset(
    """
baby elephant zoo; toilet paper; toilet brush; toilet bowl brush; bow tie pasta; orange juice; apple juice;
apple pie; carrot cake batter; banana bread; banana leaf; hot dog stand; pizza box; pizza cutter; bus stop;
bus station; train station; train track; train tracks; train platform; boat house; bird house; birdhouse;
bird feeder; bird bath; dog house; doghouse; dog bed frame; cat tree; horse racing; horse shoe; cow boy;
bed room; bed spread; table cloth; tablecloth; table top; table tennis; cup board; book shelf; bookshelf;
book case; bookcase; book store; clock radio; clock tower; car park; parking lot car; bike rack; bike path;
bike lane; bicycle rack; truck bed; bottle opener; bottle cap; wine rack; cake stand; mouse pad; mousepad;
remote area; tv stand; tv show; sink hole; chair lift; ski lift; ski slope; ski resort; ski pole; ski poles;
ski suit; ski boots; kite string; surf shop; umbrella stand; bear market; teddy boy; toy store; coach class;
computer monitor lizard; seat belt; bicycle seat; bike seat; toilet seat lid; phone booth; phone number;
telephone pole; telephone booth; telephone wires; wrist watch band; watch tower; bird 's eye; orange color;
orange in color; knife block; coffee maker; paper towel; orange shirt; orange jacket; orange vest;
orange wall; orange cone; orange hat; orange and white; orange and black; orange cat; orange flowers;
""".replace("\n", " ").split(";")
)  # fmt: skip

# An animal's young: the words are one animal, not a person.
YOUNG = ("baby", "adult", "male", "female", "young")
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")

IRREGULAR_PLURALS = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "geese": "goose",
    "mice": "mouse", "knives": "knife", "calves": "calf", "oxen": "ox", "policemen": "policeman",
    "policewomen": "policewoman", "gentlemen": "gentleman", "skis": "skis", "scissors": "scissors",
    "bus": "bus", "buses": "bus", "busses": "bus", "ladies": "lady", "wolves": "wolf",
}  # fmt: skip


def object_words() -> dict[tuple[str, ...], str]:
    """The words of a phrase, singular -> the COCO class it means."""
    table: dict[tuple[str, ...], str] = {}
    for line in _SYNONYMS.replace("\n  ", " ").strip().splitlines():
        name, _, others = line.partition(":")
        for phrase in (name, *others.split(",")):
            words = tuple(phrase.split())
            if words:
                table[words] = name
    return table
