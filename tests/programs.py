"""A program for a process of its own, and what it prints. No torch here: it is imported where there is none."""

# Nothing of the tests' own: a program that does not know tiedquiet.
LOAD = """
import tempfile
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

class Overrides(GPT2LMHeadModel):
    _tied_weights_keys = None
    def tie_weights(self, *args, **kwargs):
        self.lm_head.weight = self.transformer.wte.weight

transformers.logging.disable_progress_bar()
path = tempfile.mkdtemp()
sizes = dict(n_embd=16, n_head=2, n_layer=1, vocab_size=64, n_positions=16)
config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0)
GPT2LMHeadModel(config).save_pretrained(path)
Overrides.from_pretrained(path)
"""
LINE = "reported missing but tied to what was loaded: lm_head.weight is transformer.wte.weight"
