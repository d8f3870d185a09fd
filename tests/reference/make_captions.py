"""Score captions.json by pycocoevalcap alone, as its own COCOEvalCap does, and keep the values.

Needs a java on the PATH and a site-packages that can be written to.
"""

import json
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

here = Path(__file__).parent
data = json.loads((here / "captions.json").read_text(encoding="utf-8"))
references = {key: [{"caption": text} for text in texts] for key, texts in data["references"].items()}
predictions = {key: [{"caption": text}] for key, text in data["predictions"].items()}
gts, res = PTBTokenizer().tokenize(references), PTBTokenizer().tokenize(predictions)

bleu, bleu_each = Bleu(4).compute_score(gts, res, verbose=0)
corpus = {f"bleu{n + 1}": value for n, value in enumerate(bleu)}
each = {"bleu4": bleu_each[3]}
for name, metric in (("rouge_l", Rouge()), ("cider", Cider()), ("meteor", Meteor())):
    corpus[name], each[name] = metric.compute_score(gts, res)

values = {
    "tokens": {key: [*res[key], *gts[key]] for key in predictions},
    "corpus": {name: float(value) for name, value in corpus.items()},
    "examples": {name: [float(value) for value in values] for name, values in each.items()},
}
text = json.dumps(values, indent=1, ensure_ascii=False)
(here / "caption_scores.json").write_text(text + "\n", encoding="utf-8")
