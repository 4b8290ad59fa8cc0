"""Plain English words that the tasks make their keys and lists of."""

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
OTHERS = tuple(  # further nouns and verbs, none of them above
    """
    accept account ache act actor adapt add address admire advice afternoon agree aim air alarm allow alone ankle
    answer ant apologise appear apply approve april apron area argue arm army arrange arrive art ash ask aunt author
    avenue avoid awake award baby back bacon bag bake balance ball balloon bamboo banana band bank banner bar
    bargain bark barn barrier base bath battle bay beach bead beam bean bear beard beat beauty bed bee beef beetle
    begin behave belief belong belt bend berry bet bicycle bind birch bird birth biscuit bite blade blame blend
    bless blink block blood bloom blossom blow board body boil bone book boot border borrow boss bother bottom
    bounce bow bowl box boy brain brake brass bread break breakfast breath breeze brick bride bring broom brother
    bubble buckle budget build bull bundle burn bush business butcher butter butterfly buy buzz cabbage cable cactus
    cage cake calculate calendar calf call camera camp canal cap capital captain card care carrot carry cart carve
    case cash cat catch cattle cause cave ceiling celebrate cement centre century chain chair chalk chance change
    chapter charge chase cheek cheese chef chess chest chew chicken chief child chimney chin chocolate choice choir
    choose chop city claim clap class claw clay clerk climate climb closet cloth clothes club clue coach coal coat
    cobweb cocoa coconut code coffee collar collect college colour column comb come comet comfort command committee
    company compare complain complete computer concert confirm connect consider contain contest continue control
    cook cookie cool copy cord cork corn corner correct cost cotton couch cough count country couple courage course
    court cousin cover cow crab crack craft crane crawl crayon cream create creature crew crime crop cross crow
    crowd cruise crumb crush cry cup cupboard cure curl current curtain curve cushion customer cut cycle dairy daisy
    dance danger dare date daughter dawn day deal debt decide deck decorate deer defend degree delay deliver demand
    dentist depend describe design desk dessert detail detect develop diamond diary dice dictionary dig dinner
    direct dirt discover discuss dish dismiss dive divide doctor dog doll dollar double doubt dough down dozen drag
    dragon drain draw drawer dream dress drift drill drink drive drop duck dust duty dwell ear earn earth east eat
    echo edge edit effort egg elbow elect elephant elevator elm employ end enemy energy enjoy enter entry envelope
    equal error escape estate evening event examine example exercise exit expect explain explore extend eye eyebrow
    face fact factory fail fairy faith fall family fan fancy farm fashion father favour fear feast feed feel fellow
    festival fever fiddle fight figure file fill film finish fire fish fist fit fix float flock flood floor flour
    flow fly foam fog fold folk follow food foot football force forget fork form fort fortune frame freedom freeze
    friday friend frog front frost fruit fuel fun fur furniture future gain gallery game gap garage garlic gas
    gather ghost gift ginger giraffe girl give glance glass globe glow glue goal goat gold golf grain grandfather
    grandmother grape grass gravel gravity grin grip grocer ground group grow guard guess guest guide gum gym habit
    hair half hall ham hand handle hang happen hawk hay head health heart heat heel height help hen herb herd hero
    hide hike hint hip hire history hit hobby hold hole holiday home honey hood hook hope horn hospital host hour
    house hug hunt hurry husband hut ice idea imagine improve inch include increase indoor industry ink insect
    inside inspect instrument invent invite itch item jam january jaw jeans jelly job join joke journey joy juice
    july jump june jungle junior jury kangaroo keep kick kid kingdom kiss knee kneel knife knit knock knot know
    label lace lad lamb land lane language lap laugh laundry law lawn lawyer layer lead learn leather lecture leg
    lend length lens lesson lettuce level lick lid lie life lift limb lime limit line link lip list listen litter
    live load loaf loan lobby lobster lock log look loop lose lot love luck luggage lunch lung machine magic magnet
    maid mail make man manage map march mark marry mask mass match material matter may meal mean measure meat medal
    medicine meet melody melon melt member memory mend menu message metal meteor method middle midnight milk mind
    mine mint minute miss mist mix moment monday money month mood morning moss moth mother motor mouse mouth move
    mud mug muscle museum mushroom music mustard nail name nap napkin nation nature neck need neighbour nephew nerve
    net news newspaper nickel niece night nod noise noon north nose note notebook notice number nurse nut oar oat
    obey object obtain october offer oil opera opinion order organ ostrich outdoor outfit oval owe owner oxygen
    oyster pack page pain paint pair palm pan pancake panda panel pants parade parcel parent park part partner party
    pass passenger paste pasture patch pause pave paw pay pea peace peach peak peanut pear pedal peel pen penguin
    penny people perform perfume period permit person pet petal phone photo phrase pick picnic picture pie piece pig
    pigeon pile pill pin pinch pink pipe pirate pit pizza place plan plant plastic play plot plough plug plum
    plumber poem poet point pole police pony pool porch port position post poster pot pottery pouch pour powder
    power practice praise pray prefer prepare present press pretend price pride prince princess print prison prize
    problem produce program promise protect prove pudding pull pulse pump pumpkin punch pupil puppet puppy push
    quarrel quarter queen question queue quilt quiz race rack radar radio raft rail rain rainbow raise rake rank
    raspberry rat rate razor reach read reason receive recipe record recycle reed reflect refuse region relax remain
    remark remember remind rent repair repeat replace reply report request rescue respect rest result return reward
    rhythm rice ride ring rinse rise risk rock rod role roll room rooster root rose route row rub rubber rug rule
    ruler run rush sack saddle safe sail salad salary sale salt sand sandwich saturday sauce sausage save saw scale
    scarf scatter scene science scissors scold scoop score scout scrap scratch scream screen screw script sea seal
    search season seat second see seed sell send sense sentence september serve service settle shade shake shape
    share shark shed sheet shell shelter shield shine shirt shock shoe shop shoulder shout show shower shrimp shrink
    sick side sign signal silk sing sink sister sit size skate sketch ski skill skin skirt skull sky sled sleep
    sleeve slice slide slip slope smell smile smoke snack snail snake sneeze snow soap soccer society sock sofa soil
    soldier song sort soul sound soup south space spark sparrow speak spell spend sphere spice spider spill spin
    spirit splash sponge sport spot spray spread squad square squash squeeze squirrel stack stadium staff stage
    stamp stand start state station stay steak steal steam steel stem step stew stick sting stir stitch stocking
    stomach stool stop store story stove strap straw strawberry stream stretch string stripe student study subject
    sugar suggest suit suitcase sum sun sunday sunflower sunset supper supply support surface surprise swallow swamp
    swan sweater sweep swim swing switch sword syrup tail take talent talk tank tap tape target task taste tax taxi
    tea teach team tear tease telephone tell tennis term test text thank theatre theme theory thief thigh thing
    think throat throne throw thumb thunder thursday ticket tie tile timber time tin tip tire title toad toast toe
    together tomato tongue tool tooth top topic torch toss touch tour towel town toy track trade traffic trap travel
    tray treasure treat tree triangle tribe trick trip trouble trousers truck trumpet trunk trust truth tube tuesday
    tulip tune turkey turn twig twin twist type uncle uniform union unit universe use vacation value van vase
    vegetable vehicle veil vein vest victory video view vine vinegar visit voice volcano volleyball vote voyage
    waist wait wake walk wallet warn wash wasp watch water wave wax way wealth wear weather weave web wedding
    wednesday weed week weigh welcome west whale wheat whisper wife win wind wing wink winner wipe wire wish witness
    woman wonder wood wool word work world worm worry wrap wreck wrist write yard yarn yawn year yeast yell
    yesterday yoghurt zebra zero zipper zone zoo
    """.split()
)
