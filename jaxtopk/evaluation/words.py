"""Plain English adjectives and nouns that the tasks make their keys of."""

ADJECTIVES = tuple(
    """
    able amber ancient autumn azure bitter blank bold brave brief bright broad calm careful cheap clean clear clever cold
    common copper coral crimson curious damp dark deep dense distant dry eager early easy empty exact faint fair famous
    fast final fine firm flat foreign frank fresh frosty gentle giant glad golden grand grave green grey happy hard heavy
    hidden hollow honest humble idle inner iron ivory jolly keen kind large late lazy light linen little lively lonely
    long loud lucky marble mellow mild modern narrow neat noble northern odd olive open orange outer pale patient plain
    polite proud purple quick quiet rapid rare ready rich ripe rough round royal rural rusty sandy scarlet secret serious
    shallow sharp shiny short silent silver simple sleepy slow small smooth snowy soft solid southern spare steady steep
    still strange strict strong sturdy sudden sunny sweet swift tall tame tender thick thin tidy timid tiny upper useful
    vast violet vivid warm weary western white wide wild windy wise wooden yellow young
    """.split()
)
NOUNS = tuple(
    """
    acorn anchor apple arrow badge bakery barrel basin basket beacon bell bench blanket boat bottle branch bridge brook
    brush bucket button cabin camel candle canoe canyon carpet castle cellar chapel cherry church circle cliff clock cloud
    coast coin compass cottage cradle cricket crown dancer desert dolphin donkey door drum eagle engine falcon farmer
    feather fence ferry field finger flag flame flower flute forest fountain fox garden gate glacier glove goose guitar
    hammer harbour harvest hat helmet hill hinge horse hotel island jacket jar jewel judge kettle key kitchen kite ladder
    lake lamp lantern leaf lemon letter library lion lizard mango maple market meadow mill mirror monkey moon mountain
    needle nest oak ocean office onion orchard otter oven owl painter palace paper parrot path pearl pebble pencil pepper
    piano pillow pilot pine planet plate pocket pond potato puzzle rabbit raven ribbon river road robin rocket roof rope
    sailor salmon sandal school shadow sheep shelf ship shore shovel singer spoon spring stable stair star statue stone
    storm street summer table tailor teacher temple tent thread tiger tower trail train tunnel turtle valley village
    violin wagon wall walnut wheel whistle willow window winter wizard wolf
    """.split()
)
