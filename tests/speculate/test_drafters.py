"""Drafters on tiny random models: what a drafter proposes must not depend on what it was asked before."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3NextConfig

from moespac.config import SamplingConfig
from moespac.errors import DraftError
from moespac.experts.kernels.passes import NativePass
from moespac.speculate.drafters import ModelDrafter, NoDrafter, PromptLookupDrafter, load_draft_model
from moespac.speculate.sampling import probabilities

steady = settings(derandomize=True, deadline=None)
V = 64
SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}


def tiny_model(**changes):
    settings = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 48,
        "initializer_range": 0.4,  # far from uniform: its argmax depends on the whole context
        "eos_token_id": None,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**(settings | changes))).eval()


class Recorder:
    """A model that notes how many tokens each forward was fed."""

    def __init__(self, model):
        self.model, self.config, self.device, self.fed = model, model.config, model.device, []

    def forward(self, input_ids, **kwargs):
        self.fed.append(input_ids.shape[1])
        return self.model(input_ids=input_ids, **kwargs)

    __call__ = forward


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def fresh(model, tokens, k, vocab_size=V):
    return ModelDrafter(model, vocab_size).propose(tokens, k).tokens


# --- all of them


@pytest.mark.parametrize(
    "make",
    [
        lambda model: NoDrafter(),
        lambda model: PromptLookupDrafter(max_ngram=3, min_ngram=1),
        lambda model: ModelDrafter(model, V),
    ],
)
@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=1.0)])
def test_contract(model, make, sampling):
    drafter = make(model)
    drafter.begin(sampling, generator())
    tokens = [1, 2, 1, 2, 1]
    for k in (0, 1, 3, 0):
        before = list(tokens)
        draft = drafter.propose(tokens, k)
        assert tokens == before
        assert len(draft.tokens) <= k
        assert draft.probs is None or draft.probs.shape == (len(draft.tokens), V)
        assert all(0 <= token < V for token in draft.tokens)
    drafter.reset()
    assert len(drafter.propose([5], 2).tokens) <= 2
    drafter.close()


def test_no_drafter_drafts_nothing():
    assert NoDrafter().propose([1, 1, 1, 1], 4).tokens == []


# --- draft model


@pytest.mark.parametrize("changes", [{}, SLIDING])
@pytest.mark.parametrize("length", [1, 12])
def test_greedy_drafts_are_the_models_greedy_generation(changes, length):
    model = tiny_model(**changes)
    tokens = random.Random(1).choices(range(V), k=length)
    generated = model.generate(torch.tensor([tokens]), do_sample=False, max_new_tokens=8)[0, length:].tolist()
    assert len(set(generated)) > 2
    draft = ModelDrafter(model, V).propose(tokens, 8)
    assert draft.tokens == generated
    assert draft.probs is None


@pytest.mark.parametrize("changes", [{}, SLIDING])
def test_what_it_remembers_never_shows(changes):
    model, rng = tiny_model(**changes), random.Random(2)
    drafter = ModelDrafter(model, V)
    for _ in range(4):
        tokens = [7, 3, *rng.choices(range(V), k=rng.randrange(9))]  # requests share a beginning
        while len(tokens) < 30:
            draft = drafter.propose(tokens, 4).tokens
            assert draft == fresh(model, tokens, 4)
            tokens = [*tokens, *draft[: rng.randrange(5)], rng.randrange(V)]


def test_it_feeds_only_what_changed(model):
    recorder = Recorder(model)
    drafter = ModelDrafter(recorder, V)
    tokens = [1, 2, 3, 4, 5]

    def fed_for(tokens, k):
        recorder.fed.clear()
        drafter.propose(tokens, k)
        return list(recorder.fed)

    draft = drafter.propose(tokens, 3).tokens
    assert recorder.fed == [5, 1, 1]
    assert fed_for([*tokens, draft[0], 60], 1) == [1]  # one accepted, one corrected
    assert fed_for([*tokens, draft[0], 60], 1) == [1]  # the same again: its last token gives the logits
    assert fed_for([*tokens, 61], 2) == [1, 1]
    assert fed_for([1, 2, 62, 63], 1) == [2]
    assert fed_for([1, 2], 1) == [1]


def test_all_accepted_leaves_the_last_draft_and_the_bonus_to_feed(model):
    recorder = Recorder(model)
    drafter = ModelDrafter(recorder, V)
    draft = drafter.propose([1, 2], 3).tokens
    drafter.propose([1, 2, *draft, 60], 1)
    assert recorder.fed == [2, 1, 1, 2]


def test_asked_for_nothing_it_computes_nothing(model):
    recorder = Recorder(model)
    assert ModelDrafter(recorder, V).propose([1, 2, 3], 0).tokens == []
    assert recorder.fed == []


def test_sampled_drafts_come_with_what_they_were_drawn_from(model):
    sampling, tokens = SamplingConfig(temperature=0.8, top_k=5), [1, 2, 3]
    drafter = ModelDrafter(model, V)
    drafter.begin(sampling, generator())
    draft = drafter.propose(tokens, 4)
    with torch.inference_mode():
        logits = model(torch.tensor([[*tokens, *draft.tokens]])).logits[0, 2:-1]
    torch.testing.assert_close(draft.probs, probabilities(logits, sampling))
    assert all(row[token] > 0 for row, token in zip(draft.probs, draft.tokens, strict=True))


def test_the_requests_generator_decides_the_draws(model):
    def drafts(seed):
        drafter = ModelDrafter(model, V)
        drafter.begin(SamplingConfig(temperature=2.0), generator(seed))
        return drafter.propose([1, 2, 3], 12).tokens

    assert drafts(1) == drafts(1) != drafts(2)


@pytest.mark.parametrize(("length", "drafted"), [(43, 5), (46, 3), (48, 1), (49, 0), (60, 0)])
def test_the_end_of_its_context(model, length, drafted):
    recorder = Recorder(model)
    assert len(ModelDrafter(recorder, V).propose([1] * length, 5).tokens) == drafted
    assert sum(recorder.fed) <= 48


@pytest.mark.parametrize("width", [40, 80])
def test_padding_is_cut_or_impossible(model, width):
    sampling = SamplingConfig(temperature=3.0)
    drafter = ModelDrafter(model, width)
    drafter.begin(sampling, generator())
    draft = drafter.propose([1, 2, 3], 20)
    assert draft.probs.shape == (20, width)
    assert draft.probs.sum(dim=-1).allclose(torch.ones(20))
    assert max(draft.tokens) < min(width, V)
    assert draft.probs[:, V:].sum() == 0


def test_a_token_it_lacks_gets_no_draft(model):
    drafter = ModelDrafter(model, 80)
    assert drafter.propose([1, 70], 3).tokens == []
    assert drafter.propose([1, 2], 3).tokens == fresh(model, [1, 2], 3, 80)


@pytest.mark.parametrize("changes", [{}, SLIDING])  # run lean, and by transformers
def test_a_forward_cut_short_leaves_nothing_behind(changes, monkeypatch):
    model = tiny_model(**changes)
    drafter = ModelDrafter(model, V)
    drafter.propose([1, 2, 3], 3)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # the layers have already cached
        patch.setattr(NativePass, "logits", property(interrupt))
        hook = model.model.norm.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            drafter.propose([1, 2, 3, 4], 3)
        hook.remove()
    assert drafter.propose([1, 2, 3, 4], 3).tokens == fresh(model, [1, 2, 3, 4], 3)


def test_ticks_fall_between_drafted_tokens(model):
    ticks = []
    drafter = ModelDrafter(model, V, tick=lambda: ticks.append(None))
    drafter.propose([1, 2], 0)
    drafter.propose([1, 2], 1)
    assert len(ticks) == 0
    drafter.propose([1, 2], 4)
    assert len(ticks) == 3


# --- looking back


def greedy_chances(count):
    return [1.0] * count


def first_drafts(model, tokens, count):
    """Whether each of the last ``count`` tokens is what a drafter that never saw one before would have drafted."""
    return [fresh(model, tokens[:at], 1) == [tokens[at]] for at in range(len(tokens) - count, len(tokens))]


def half_right(model, length, seed=3):
    """A text that goes on as the model says, but for every other place or so."""
    rng, tokens = random.Random(seed), [7, 3]
    while len(tokens) < length:
        tokens += fresh(model, tokens, 1) if rng.random() < 0.5 else [rng.randrange(V)]
    return tokens


@pytest.mark.parametrize("changes", [{}, SLIDING])  # run lean, and by transformers
def test_a_model_looks_back_on_what_it_would_have_drafted_in_one_pass(changes):
    model = tiny_model(**changes)
    tokens = half_right(model, 30)
    recorder = Recorder(model)
    expected = first_drafts(model, tokens, 20)
    assert 5 < sum(expected) < 15
    for looked_at in (model, recorder):
        assert ModelDrafter(looked_at, V).look_back(tokens, greedy_chances(20)) == expected
    assert recorder.fed == [29]


def test_a_look_back_feeds_what_is_missing_and_judges_no_token_twice(model):
    tokens = half_right(model, 24)
    drafter = ModelDrafter(model, V)
    drafter.look_back(tokens[:20], greedy_chances(8))
    assert drafter._cached == tokens[:19]
    assert drafter.look_back(tokens, greedy_chances(8)) == first_drafts(model, tokens, 4)
    assert drafter._cached == tokens[:23]
    assert drafter.look_back(tokens, greedy_chances(8)) == []


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=1.0, top_k=8)])
def test_a_look_back_changes_no_draft(model, k, sampling):
    tokens = half_right(model, 28)
    asked, untouched = ModelDrafter(model, V), ModelDrafter(model, V)
    for drafter in (asked, untouched):
        drafter.begin(sampling, generator())
    for length in (9, 12, 21, 28):
        asked.look_back(tokens[:length], greedy_chances(min(length - 2, 9)))
        drafts = asked.propose(tokens[:length], k), untouched.propose(tokens[:length], k)
        assert drafts[0].tokens == drafts[1].tokens
        if not sampling.greedy:
            torch.testing.assert_close(drafts[0].probs, drafts[1].probs)


def test_a_look_back_stays_within_the_context_and_the_vocabulary(model):
    assert ModelDrafter(model, V).look_back([1] * 49, greedy_chances(4)) == []
    assert len(ModelDrafter(model, V).look_back([1] * 48, greedy_chances(4))) == 4
    assert ModelDrafter(model, 80).look_back([1, 2, 70, 3], greedy_chances(2)) == []


def test_drawn_tokens_tell_how_often_drawn_drafts_are_kept(model):
    """Tokens drawn from p: the mean of min(1, q / p) over them is the sum of min(p, q)."""
    sampling = SamplingConfig(temperature=2.0)
    drafter = ModelDrafter(model, V)
    drafter.begin(sampling, generator())
    prompt = [5, 9, 11]
    with torch.inference_mode():
        (q,) = probabilities(model(torch.tensor([prompt])).logits[0, -1:], sampling)
    p = (torch.rand(V, generator=generator(1)) ** 4 + 0.1 * q).softmax(dim=-1) * 0.5 + 0.5 * q.roll(1)
    seen = []
    for token in torch.multinomial(p, 400, replacement=True, generator=generator(2)).tolist():
        seen += drafter.look_back([*prompt, token], [float(p[token])])
        drafter.propose(prompt, 1)  # forgets the token
        drafter._rewind(prompt)
    kept = float(torch.minimum(p, q).sum())
    agreement = float((p * q).sum())
    assert len(seen) == 400
    assert abs(sum(seen) / 400 - kept) < 0.06 < kept - agreement


def test_nobody_looks_back_on_nothing():
    assert NoDrafter().look_back([1, 1, 1, 1], greedy_chances(2)) == []


@pytest.mark.parametrize(
    ("tokens", "count", "seen"),
    [
        ([1, 2, 3, 1, 2, 3, 1, 9], 3, [1, 1, 0]),
        ([1, 2, 3, 1, 2, 3, 1, 9], 8, [1, 1, 0]),  # before, it would have drafted nothing
        ([1, 2, 3, 4, 5], 3, []),
    ],
)
def test_lookup_looks_back_by_hand(tokens, count, seen):
    drafter = PromptLookupDrafter(max_ngram=3, min_ngram=2)
    assert drafter.look_back(tokens, greedy_chances(count)) == seen


@steady
@given(st.lists(st.integers(0, 2), min_size=2, max_size=30), st.integers(1, 29), st.integers(0, 29))
def test_lookup_looks_back_on_what_a_search_finds_and_drafts_as_ever(tokens, count, known):
    drafter, count = PromptLookupDrafter(max_ngram=3, min_ngram=1), min(count, len(tokens) - 1)
    drafter.propose(tokens[: max(min(known, len(tokens) - count), 1)], 1)
    drafts = [(at, looked_up(tokens[:at], 1, 3, 1)) for at in range(len(tokens) - count, len(tokens))]
    expected = [float(draft == [tokens[at]]) for at, draft in drafts if draft]
    assert drafter.look_back(tokens, greedy_chances(count)) == expected
    assert drafter.propose(tokens, 3).tokens == looked_up(tokens, 3, 3, 1)


# --- loading one


def tokenizer(words):
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=words[0])


WORDS = [f"w{i}" for i in range(40)]


def saved(tmp_path, words=WORDS, **changes):
    tiny_model(**changes).save_pretrained(tmp_path)
    if words:
        tokenizer(words).save_pretrained(tmp_path)
    return tmp_path


def load(path, words=WORDS, vocab_size=V):
    return load_draft_model(path, vocab_size, tokenizer(words) if words else None, torch.float32)


@pytest.mark.parametrize(("draft_size", "target_size"), [(V, V), (V, 48), (48, V)])
def test_equal_tokens_fit_whatever_the_padding(tmp_path, draft_size, target_size):
    model = load(saved(tmp_path, vocab_size=draft_size), vocab_size=target_size)
    assert not model.training
    assert model.dtype == torch.float32
    assert fresh(model, [1, 2, 3], 4, target_size) == fresh(
        tiny_model(vocab_size=draft_size), [1, 2, 3], 4, target_size
    )


@pytest.mark.parametrize(("theirs", "ours"), [(None, WORDS), (WORDS, None), (None, None)])
def test_without_both_tokenizers_the_size_decides(tmp_path, theirs, ours):
    saved(tmp_path, theirs)
    load(tmp_path, ours)
    refused(tmp_path, "a vocabulary of 64, the target of 65", ours, V + 1)


def refused(path, reason, words=WORDS, vocab_size=V):
    with pytest.raises(DraftError, match=reason) as caught:
        load(path, words, vocab_size)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_model_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "no draft model")
    refused(tmp_path, "cannot load")


@pytest.mark.parametrize("words", [[*WORDS[:-2], WORDS[-1], WORDS[-2]], WORDS[:-1], [*WORDS, "more"]])
def test_other_tokens_are_refused_though_the_size_is_the_same(tmp_path, words):
    refused(saved(tmp_path, words), "other tokens")


@pytest.mark.parametrize(("draft_size", "target_size"), [(39, V), (V, 39)])
def test_embeddings_that_lack_tokens_are_refused(tmp_path, draft_size, target_size):
    refused(saved(tmp_path, vocab_size=draft_size), "a vocabulary of", vocab_size=target_size)


def test_recurrent_layers_are_refused(tmp_path):
    Qwen3NextConfig().save_pretrained(tmp_path)
    refused(tmp_path, "recurrent")


def test_truncated_weights_are_refused(tmp_path):
    weights = saved(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(tmp_path, "cannot load")


def test_missing_weights_are_refused(tmp_path):
    saved(tmp_path)
    config = Qwen3Config.from_pretrained(tmp_path)
    config.num_hidden_layers, config.layer_types = 3, ["full_attention"] * 3
    config.save_pretrained(tmp_path)
    refused(tmp_path, "lacks 11 tensors")


# --- prompt lookup


@pytest.mark.parametrize(
    ("tokens", "k", "drafted"),
    [
        ([1, 2, 3, 4, 1, 2], 2, [3, 4]),
        ([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], 1, [4]),  # the most recent occurrence
        ([5, 1, 2, 3, 7, 1, 2, 4, 5, 1, 2], 1, [3]),  # a longer match before a more recent one
        ([1, 2, 3], 3, []),
        ([1], 3, []),
        ([4, 4, 4], 3, [4, 4, 4]),
        ([1, 2, 3, 1, 2, 3], 5, [1, 2, 3, 1, 2]),  # the match overlaps its own continuation: it goes round
        ([2, 9, 2], 2, []),  # one equal token is below min_ngram
    ],
)
def test_lookup_by_hand(tokens, k, drafted):
    assert PromptLookupDrafter(max_ngram=3, min_ngram=2).propose(tokens, k).tokens == drafted


def looked_up(tokens, k, longest, shortest):
    """The same by searching: longest n-gram first, most recent occurrence first."""
    for n in range(longest, shortest - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                extended = list(tokens)
                for i in range(k):
                    extended.append(extended[start + n + i])
                return extended[len(tokens) :]
    return []


@steady
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=6), st.integers(0, 6)
)
def test_lookup_finds_what_a_search_finds_as_the_sequence_grows(steps, k):
    drafter, tokens = PromptLookupDrafter(max_ngram=3, min_ngram=1), []
    for step in steps:
        tokens = tokens + step
        assert drafter.propose(tokens, k).tokens == looked_up(tokens, k, 3, 1)


def test_lookup_forgets_another_sequence():
    drafter = PromptLookupDrafter(max_ngram=2, min_ngram=2)
    drafter.propose([1, 2, 3, 4, 5], 2)
    assert drafter.propose([6, 7, 1, 2], 2).tokens == []
    assert drafter.propose([6, 7, 1, 2, 8, 1, 2], 2).tokens == [8, 1]


def test_lookup_indexes_each_position_once():
    drafter, tokens = PromptLookupDrafter(max_ngram=2, min_ngram=2), []
    index = drafter._next = CountingDict()
    for token in range(50):
        tokens = [*tokens, token]
        drafter.propose(tokens, 1)
    assert index.writes == 48  # every pair but the last, which nothing follows


class CountingDict(dict):
    writes = 0

    def __setitem__(self, key, value):
        self.writes += 1
        super().__setitem__(key, value)
