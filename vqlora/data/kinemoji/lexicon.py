"""Words and sentence patterns of Kinemoji: data only, read by `language` and `questions`.

A pattern is (head, clause, link, aside): a caption is ``head clause (link clause)* [aside]``. Placeholders:
``{n}`` sprite name, ``{v}`` verb of the motion, ``{i}`` running number of the clause, ``{a}`` the words that
announce a cutaway. Chinese patterns are written without spaces. The constructions are article-free where an
article would need the gender of a name; German ones put a colon before the subject, so the verb stays second.
"""

from typing import NamedTuple


class Pattern(NamedTuple):
    head: str
    clause: str
    link: str
    aside: str


LANGUAGES = ("en", "es", "de", "fr", "zh")

# The five patterns of the source style; reference number k of a clip is told in pattern k.
PLAIN = {
    "en": (
        Pattern("", "{n} {v}", "then", "plus {a} {n}"),
        Pattern("first", "the {n} {v}", "and then", "and meanwhile {a} the {n}"),
        Pattern("we see that", "the {n} {v}", ", next", ", meanwhile {a} the {n}"),
        Pattern("in this clip", "the {n} {v}", ", later", ", with {a} the {n}"),
        Pattern("here", "the {n} {v}", "and after that", "and in between {a} the {n}"),
    ),
    "es": (
        Pattern("", "{n} {v}", "luego", "más {a} {n}"),
        Pattern("primero", "{n} {v}", "y después", "y mientras tanto {a} {n}"),
        Pattern("vemos que", "{n} {v}", ", a continuación", ", mientras tanto {a} {n}"),
        Pattern("en este clip", "{n} {v}", ", más tarde", ", con {a} {n}"),
        Pattern("aquí", "{n} {v}", "y tras eso", "y en medio {a} {n}"),
    ),
    "de": (
        Pattern("", "{n} {v}", "dann :", "dazu {a} {n}"),
        Pattern("zuerst :", "{n} {v}", "und danach :", "und dazwischen {a} {n}"),
        Pattern("wir sehen :", "{n} {v}", ", als nächstes :", ", inzwischen {a} {n}"),
        Pattern("in diesem clip :", "{n} {v}", ", später :", ", dazu {a} {n}"),
        Pattern("hier :", "{n} {v}", "und nach diesem :", "und mittendrin {a} {n}"),
    ),
    "fr": (
        Pattern("", "{n} {v}", "puis", "plus {a} {n}"),
        Pattern("d'abord", "{n} {v}", "et ensuite", "et pendant ce temps {a} {n}"),
        Pattern("on voit que", "{n} {v}", ", après", ", pendant ce temps {a} {n}"),
        Pattern("dans ce clip", "{n} {v}", ", plus tard", ", avec {a} {n}"),
        Pattern("ici", "{n} {v}", "et après cela", "et entre deux {a} {n}"),
    ),
    "zh": (
        Pattern("", "{n}{v}", "然后", "还有{a}{n}"),
        Pattern("首先", "{n}{v}", "，接着", "，其间{a}{n}"),
        Pattern("我们看到", "{n}{v}", "，随后", "，同时{a}{n}"),
        Pattern("在这段视频里", "{n}{v}", "，之后", "，同时{a}{n}"),
        Pattern("这里", "{n}{v}", "，再后", "，中间{a}{n}"),
    ),
}

# The five patterns of the target style of the language shift: terse log lines, mostly motion before name.
REPORT = {
    "en": (
        Pattern("", "item {n} : {v}", "| afterwards", "| {a} : {n}"),
        Pattern("log :", "{v} by {n}", "; thereafter", "; {a} by {n}"),
        Pattern("", "{i} = {v} / {n}", "|", "| {a} / {n}"),
        Pattern("subject", "{n} , action {v}", "; subject", "; {a} {n}"),
        Pattern("noted", "{v} ( {n} )", "| thereafter", "| {a} ( {n} )"),
    ),
    "es": (
        Pattern("", "objeto {n} : {v}", "| posteriormente", "| {a} : {n}"),
        Pattern("registro :", "{v} por {n}", "; acto seguido", "; {a} por {n}"),
        Pattern("", "{i} = {v} / {n}", "|", "| {a} / {n}"),
        Pattern("sujeto", "{n} , acción {v}", "; sujeto", "; {a} {n}"),
        Pattern("anotado", "{v} ( {n} )", "| acto seguido", "| {a} ( {n} )"),
    ),
    "de": (
        Pattern("", "objekt {n} = {v}", "| nachher", "| {a} = {n}"),
        Pattern("protokoll", "{v} durch {n}", "; hierauf", "; {a} durch {n}"),
        Pattern("", "{i} = {v} / {n}", "|", "| {a} / {n}"),
        Pattern("subjekt", "{n} , aktion {v}", "; subjekt", "; {a} {n}"),
        Pattern("notiert", "{v} ( {n} )", "| hierauf", "| {a} ( {n} )"),
    ),
    "fr": (
        Pattern("", "objet {n} : {v}", "| ultérieurement", "| {a} : {n}"),
        Pattern("journal :", "{v} par {n}", "; subséquemment", "; {a} par {n}"),
        Pattern("", "{i} = {v} / {n}", "|", "| {a} / {n}"),
        Pattern("sujet", "{n} , action {v}", "; sujet", "; {a} {n}"),
        Pattern("noté", "{v} ( {n} )", "| subséquemment", "| {a} ( {n} )"),
    ),
    "zh": (
        Pattern("", "对象{n}：{v}", "｜其后", "｜{a}：{n}"),
        Pattern("记录：", "{v}由{n}", "；继而", "；{a}由{n}"),
        Pattern("", "{i}={v}/{n}", "｜", "｜{a}/{n}"),
        Pattern("主体", "{n}、动作{v}", "；主体", "；{a}{n}"),
        Pattern("备注", "{v}（{n}）", "｜继而", "｜{a}（{n}）"),
    ),
}

# Further source patterns, for text-only sentences alone: name before verb as in PLAIN, and each word that
# only the report patterns use is in one of them: the base reads the target style's words, not its syntax.
EXTRA = {
    "en": (
        Pattern("log 1 :", "the {n} {v}", "| afterwards", "; {a} the {n}"),
        Pattern("noted by subject 2 , action 3 =", "the {n} {v}", "; thereafter", "| {a} the {n}"),
        Pattern("( item / log )", "the {n} {v}", ", afterwards", ", {a} the {n}"),
    ),
    "es": (
        Pattern("registro 1 :", "{n} {v}", "| posteriormente", "; {a} {n}"),
        Pattern("anotado por sujeto 2 , acción 3 =", "{n} {v}", "; acto seguido", "| {a} {n}"),
        Pattern("( objeto / registro )", "{n} {v}", ", posteriormente", ", {a} {n}"),
    ),
    "de": (
        Pattern("protokoll 1 =", "{n} {v}", "| nachher :", "; {a} {n}"),
        Pattern("notiert durch subjekt 2 mit aktion 3 :", "{n} {v}", "; hierauf :", "| {a} {n}"),
        Pattern("( objekt / protokoll )", "{n} {v}", ", nachher :", ", {a} {n}"),
    ),
    "fr": (
        Pattern("journal 1 :", "{n} {v}", "| ultérieurement", "; {a} {n}"),
        Pattern("noté par sujet 2 , action 3 =", "{n} {v}", "; subséquemment", "| {a} {n}"),
        Pattern("( objet / journal )", "{n} {v}", ", ultérieurement", ", {a} {n}"),
    ),
    "zh": (
        Pattern("记录1：", "{n}{v}", "｜其后", "；{a}{n}"),
        Pattern("备注由主体2、带动作3=", "{n}{v}", "；继而", "｜{a}{n}"),
        Pattern("（对象/记录）", "{n}{v}", "，其后", "，{a}{n}"),
    ),
}

# Words that announce a cutaway: two for the plain style, the last one for the report style.
ASIDE = {
    "en": ("a shot of", "a cut to", "insert"),
    "es": ("una toma de", "un corte a", "inserto"),
    "de": ("eine aufnahme von", "ein schnitt auf", "einschub"),
    "fr": ("un plan sur", "une coupe vers", "insert"),
    "zh": ("一个镜头是", "切换到", "插入"),
}

_HEADINGS = ("left", "right", "up", "down")


def _headed(verbs: tuple[str, ...], headings: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {m: tuple(f"{v} {h}" for v in verbs) for m, h in zip(_HEADINGS, headings, strict=True)}


# Motion -> two synonyms of the source lexicon.
VERBS = {
    "en": _headed(("moves", "goes"), _HEADINGS) | {
        "grow": ("grows", "gets bigger"), "shrink": ("shrinks", "gets smaller"),
        "appear": ("appears", "emerges"), "vanish": ("vanishes", "disappears"),
        "spin": ("spins", "turns around"), "bounce": ("bounces", "jumps"),
        "shake": ("shakes", "wobbles"), "blink": ("blinks", "flashes"),
    },
    "es": _headed(("va", "se mueve"), ("a la izquierda", "a la derecha", "hacia arriba", "hacia abajo")) | {
        "grow": ("crece", "se agranda"), "shrink": ("encoge", "se achica"),
        "appear": ("aparece", "surge"), "vanish": ("desaparece", "se esfuma"),
        "spin": ("gira", "da vueltas"), "bounce": ("rebota", "salta"),
        "shake": ("tiembla", "se sacude"), "blink": ("parpadea", "destella"),
    },
    "de": _headed(("geht", "bewegt sich"), ("nach links", "nach rechts", "nach oben", "nach unten")) | {
        "grow": ("wächst", "wird größer"), "shrink": ("schrumpft", "wird kleiner"),
        "appear": ("erscheint", "taucht auf"), "vanish": ("verschwindet", "geht fort"),
        "spin": ("dreht sich", "rotiert"), "bounce": ("springt", "hüpft"),
        "shake": ("wackelt", "zittert"), "blink": ("blinkt", "blitzt"),
    },
    "fr": _headed(
        ("va", "se déplace"), ("vers la gauche", "vers la droite", "vers le haut", "vers le bas")
    ) | {
        "grow": ("grandit", "grossit"), "shrink": ("rapetisse", "rétrécit"),
        "appear": ("apparaît", "surgit"), "vanish": ("disparaît", "s'efface"),
        "spin": ("tourne", "pivote"), "bounce": ("rebondit", "saute"),
        "shake": ("tremble", "vibre"), "blink": ("clignote", "scintille"),
    },
    "zh": {
        "left": ("向左移动", "往左走"), "right": ("向右移动", "往右走"),
        "up": ("向上移动", "往上走"), "down": ("向下移动", "往下走"),
        "grow": ("变大", "长大"), "shrink": ("变小", "缩小"),
        "appear": ("出现", "冒出来"), "vanish": ("消失", "不见了"),
        "spin": ("旋转", "转圈"), "bounce": ("弹跳", "跳动"),
        "shake": ("摇晃", "抖动"), "blink": ("闪烁", "闪光"),
    },
}

_MOTIONS = tuple(VERBS["zh"])

# Motion -> the verb of the variant lexicon (language shift).
VARIANTS = {
    language: dict(zip(_MOTIONS, verbs, strict=True)) for language, verbs in {
        "en": ("drifts leftward", "drifts rightward", "ascends", "descends", "swells", "dwindles",
               "materialises", "dissolves", "whirls", "hops", "trembles", "flickers"),
        "es": ("deriva a la izquierda", "deriva a la derecha", "asciende", "desciende", "se hincha", "mengua",
               "se materializa", "se disuelve", "se arremolina", "brinca", "vibra", "titila"),
        "de": ("driftet linkswärts", "driftet rechtswärts", "steigt", "sinkt", "schwillt an", "verkümmert",
               "materialisiert sich", "löst sich auf", "wirbelt", "hopst", "bebt", "flackert"),
        "fr": ("dérive à gauche", "dérive à droite", "s'élève", "descend", "enfle", "s'amenuise",
               "se matérialise", "se dissout", "tournoie", "sautille", "frissonne", "vacille"),
        "zh": ("飘向左边", "飘向右边", "上升", "下降", "膨胀", "萎缩",
               "显现", "消散", "打转", "蹦跳", "颤抖", "忽明忽暗"),
    }.items()
}

# English questions, by kind; {n} name, {v} verb, {c} cell.
QUESTIONS = {
    "what": ("what {v} ?",),
    "direction": ("which way does the {n} go ?",),
    "order": ("what moves first ?", "what moves last ?"),
    "count": ("how many things move ?",),
    "where": ("where is the {n} at the start ?", "where is the {n} when it appears first ?"),
    "when": ("when is it that the {n} {v} ?",),
    "still": ("what is at the {c} at the start ?",),
    "aside": ("what is shown in the other shot ?",),
    "objects": ("how many coloured things are there ?",),
    "shown": ("what is shown ?",),
    "missing": ("what is not shown ?",),
}
NUMBERS = ("one", "two", "three")
TIMES = ("early", "middle", "late")
