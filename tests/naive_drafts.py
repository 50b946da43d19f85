"""Drafts without a model, in plain Python: the oracles of the draft-free proposers."""

import itertools
from collections import Counter, defaultdict

ONE = 1 << 15


def ngram(text, size, longest, shortest=1):
    """Copies what followed the latest of the longest earlier copies of the end."""
    for n in range(min(longest, len(text) - 1), shortest - 1, -1):
        for start in range(len(text) - 1, n - 1, -1):
            if text[start - n : start] == text[-n:]:
                grown = list(text)
                for i in range(size):
                    grown.append(grown[start + i])  # also what was just copied
                return grown[len(text) :]
    return []


def prompt_lookup(text, size, longest):
    """As transformers 5: the first match from the left, up to the end of the text."""
    for n in range(min(longest, len(text) - 1), 0, -1):
        for start in range(n, len(text)):
            if text[start - n : start] == text[-n:]:
                return text[start : start + size]
    return []


def adaptive(text, size, order):
    """The likeliest next token of the longest known context, by counting everything.

    The next tokens of a context are ranked by count, then by their latest occurrence.
    """
    table = defaultdict(Counter)
    latest = {}
    for i, token in enumerate(text):
        for n in range(1, min(order, i + 1)):
            table[tuple(text[i - n : i])][token] += 1
            latest[*text[i - n : i], token] = i
    grown = list(text)
    for _ in range(size):
        for n in range(min(order - 1, len(grown)), 0, -1):
            context = tuple(grown[-n:])
            if context in table:
                found = table[context]
                ranks = {t: (c, latest[*context, t]) for t, c in found.items()}
                grown.append(max(ranks, key=ranks.__getitem__))
                break
        else:
            break
    return grown[len(text) :]


def hashes(tokens, order):
    """32-bit hashes of the last 1 .. order tokens, read backwards."""
    value, found = 0x811C9DC5, []
    for token in tokens[::-1][:order]:
        value = (value ^ (token % 2**32)) * 0x9E3779B1 % 2**32
        value ^= value >> 15
        value = value * 0x85EBCA6B % 2**32
        value ^= value >> 13
        found.append(value)
    return found


def adaptive_tables(text, size, order, slots):
    """The same by tables of cells that n-grams may share, filled token by token."""
    count, best = Counter(), {}
    for i in range(1, len(text)):
        before, here = hashes(text[:i], order), hashes(text[: i + 1], order)
        for n in range(1, min(order, i + 1)):
            count[n, here[n] % slots] += 1
            cell = n, before[n - 1] % slots
            best[cell] = max(best.get(cell, (0, 0)), (count[n, here[n] % slots], i))
    grown = list(text)
    for _ in range(size):
        cells = hashes(grown, order)
        for n in range(min(order - 1, len(grown)), 0, -1):
            _, place = best.get((n, cells[n - 1] % slots), (0, 0))
            if place >= n and text[place - n : place] == grown[-n:]:
                grown.append(text[place])
                break
        else:
            break
    return grown[len(text) :]


def suffix(text, size, depth, factor, offset, threshold, occurrences):
    """For every length of match a path of likeliest tokens; the best path in the sum.

    The probability of a path is the share of the occurrences that went that way, in
    units of 2^-15, rounded down.
    """
    end = len(text)
    agree = []
    for start in range(end):
        n = 0
        while n < min(depth, start) and text[start - 1 - n] == text[end - 1 - n]:
            n += 1
        agree.append(n)
    ranked = sorted(range(end), key=lambda j: (agree[j], j), reverse=True)
    ranked = [j for j in ranked[:occurrences] if agree[j] > 0]
    best, best_score = [], 0
    for match in range(1, depth + 1):
        at = [j for j in ranked if agree[j] >= match]
        if not at:
            break
        grown, score, share = list(text), 0, ONE
        for _ in range(min(size, int(match * factor + offset + 1e-6))):
            votes = Counter(grown[j] for j in at)
            # of equals the one whose vote ranks first
            token = max(votes, key=lambda t: votes[t])
            share = share * votes[token] // len(at)
            if share < threshold * ONE or share == 0:
                break
            grown.append(token)
            score += share
            at = [j + 1 for j in at if grown[j] == token]
        if score > 0 and score >= best_score:
            best, best_score = grown[end:], score
    return best


def first_lists(prompt):
    """The last next token of every token of the prompt."""
    return {a: [b] for a, b in itertools.pairwise(prompt)}


def recycle(lists, pending, paths):
    """The nodes of the tree whose token is known: [(token, path)]."""
    token = {(): pending}
    for path in paths:
        above = lists.get(token.get(path[:-1]), [])
        if len(above) > path[-1]:
            token[path] = above[path[-1]]
    return [(token[path], path) for path in paths if path in token]


def read(lists, tokens, kept, logits, width):
    """Every token that was read gets a new list; kept ones have the last word.

    Args:
      lists: changed in place.
      tokens: the pending one, then the nodes.
      kept: places of the pending one and the accepted ones, in order.
      logits: behind every token.
      width: R.
    """
    order = [i for i in range(len(tokens)) if i not in kept] + list(kept)
    old = {token: list(lists.get(token, [])) for token in tokens}
    for i in order:
        row = logits[i]
        best = sorted(range(len(row)), key=lambda v: (-row[v], v))[:width]
        new = [v for v in best if row[v] > -float("inf")]
        rest = [v for v in old[tokens[i]] if v not in new]
        lists[tokens[i]] = (new + rest)[:width]


class Lookahead:
    """One row of lookahead decoding, with lists and dictionaries."""

    def __init__(self, prompt, window, order, guesses):
        self.size, self.levels, self.guesses = window, order - 1, guesses
        self.window = [
            [prompt[(i + w) % len(prompt)] for w in range(window)]
            for i in range(order - 1)
        ]
        self.pool = defaultdict(list)
        for i in range(len(prompt) - order + 1):
            self.keep(prompt[i : i + order])

    def keep(self, gram):
        """To the front of the list of its first token."""
        found = self.pool[gram[0]]
        new = tuple(gram[1:])
        self.pool[gram[0]] = [new, *(old for old in found if old != new)]
        del self.pool[gram[0]][self.guesses :]

    def paths(self, pending):
        """The path of tokens of every node: those of the pool, then the window."""
        found = [
            tuple(gram[: i + 1])
            for gram in self.pool[pending]
            for i in range(self.levels)
        ]
        for i in range(self.levels):
            for w in range(self.size):
                chain = [self.window[j][w] for j in range(1, i + 1)]
                found.append(tuple(self.window[0][: w + 1] + chain))
        return found

    def hear(self, said, count):
        """What the target said behind the last W nodes; count more tokens stand."""
        grown = [*self.window, said]
        for w in range(self.size):
            self.keep([row[w] for row in grown])
        last = self.size - 1
        self.window = [
            [row[min(w + count - 1, last)] for w in range(self.size)]
            for row in grown[1:]
        ]
