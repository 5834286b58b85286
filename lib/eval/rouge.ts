import { quote } from '../errors.js'
import { porterStem } from './porter.js'

/**
 * One ROUGE figure; each in [0, 1], 0 where a text has nothing to count.
 *
 * @category Evaluation
 */
export interface RougeScore {
  /** Share of the prediction that stands in the reference. */
  precision: number
  /** Share of the reference that stands in the prediction. */
  recall: number
  /** Their harmonic mean: the figure that papers give. */
  fmeasure: number
}

/**
 * What {@link rouge} gives.
 *
 * @category Evaluation
 */
export interface RougeScores {
  /** Of words. */
  rouge1: RougeScore
  /** Of pairs of neighbouring words. */
  rouge2: RougeScore
  /** Of the longest common subsequence of the whole texts. */
  rougeL: RougeScore
  /** Of the union of longest common subsequences between lines, each line being a sentence. */
  rougeLsum: RougeScore
}

/** The figures' names, in the order in which they are shown. */
export const rougeTypes = ['rouge1', 'rouge2', 'rougeL', 'rougeLsum'] as const

/**
 * ROUGE-1, -2, -L and -Lsum (C.-Y. Lin, "ROUGE: a package for automatic evaluation of summaries", 2004) of a prediction
 * against its reference, as Google's rouge_score 0.1.2 computes them: lower case, words of a-z and 0-9, words of more than
 * three letters reduced to their Porter stem where `stemmer` is set (default true; rouge_score's own default is False),
 * lines taken for sentences in ROUGE-Lsum (`split_summaries` False). Throws TypeError for what is no string.
 *
 * @category Evaluation
 */
export function rouge(reference: string, prediction: string, options: { stemmer?: boolean } = {}): RougeScores {
  for (const [name, text] of Object.entries({ reference, prediction })) {
    if (typeof text !== 'string') throw new TypeError(`${name} is ${quote(text)}, but must be a string`)
  }
  const { stemmer = true } = options
  const words = (text: string): string[] => wordsOf(text, stemmer)
  const sentences = (text: string): string[][] => text.split('\n').map(words)
  const [target, guess] = [words(reference), words(prediction)]
  return {
    rouge1: overlap(target, guess, 1),
    rouge2: overlap(target, guess, 2),
    rougeL: score(commonLength(target, guess), target.length, guess.length),
    rougeLsum: summaryLevel(sentences(reference), sentences(prediction)),
  }
}

function wordsOf(text: string, stemmer: boolean): string[] {
  const words = text.toLowerCase().match(/[a-z0-9]+/g) ?? []
  if (!stemmer) return words
  return words.map((word) => (word.length > 3 ? porterStem(word) : word)).filter((word) => word !== '')
}

/** Hits among `target` and `guess` things. */
function score(hits: number, target: number, guess: number): RougeScore {
  const precision = hits / Math.max(guess, 1)
  const recall = hits / Math.max(target, 1)
  const sum = precision + recall
  return { precision, recall, fmeasure: sum > 0 ? (2 * precision * recall) / sum : 0 }
}

function countOf(items: Iterable<string>): Map<string, number> {
  const counts = new Map<string, number>()
  for (const item of items) counts.set(item, (counts.get(item) ?? 0) + 1)
  return counts
}

/** ROUGE-N: runs of n words that both texts have, each as often as in the one that has fewer. */
function overlap(target: readonly string[], guess: readonly string[], n: number): RougeScore {
  const runs = (words: readonly string[]): string[] =>
    words.slice(0, Math.max(0, words.length - n + 1)).map((_, at) => words.slice(at, at + n).join(' '))
  const [targets, guesses] = [runs(target), runs(guess)]
  const counts = countOf(guesses)
  let hits = 0
  for (const [run, count] of countOf(targets)) hits += Math.min(count, counts.get(run) ?? 0)
  return score(hits, targets.length, guesses.length)
}

/** Length of the longest common subsequence, in two rows of its table. */
function commonLength(target: readonly string[], guess: readonly string[]): number {
  let row = new Int32Array(guess.length + 1)
  for (const word of target) {
    const next = new Int32Array(guess.length + 1)
    for (let j = 1; j <= guess.length; j++) {
      next[j] = word === guess[j - 1] ? row[j - 1]! + 1 : Math.max(row[j]!, next[j - 1]!)
    }
    row = next
  }
  return row[guess.length]!
}

/** Places in `target` of one longest common subsequence: of several, the one that rouge_score reads from the table. */
function commonPlaces(target: readonly string[], guess: readonly string[]): number[] {
  const width = guess.length + 1
  const table = new Int32Array((target.length + 1) * width)
  for (let i = 1; i <= target.length; i++) {
    for (let j = 1; j < width; j++) {
      const at = i * width + j
      table[at] =
        target[i - 1] === guess[j - 1] ? table[at - width - 1]! + 1 : Math.max(table[at - width]!, table[at - 1]!)
    }
  }
  const places: number[] = []
  for (let i = target.length, j = guess.length; i > 0 && j > 0;) {
    if (target[i - 1] === guess[j - 1]) {
      places.push(--i)
      j--
    } else if (table[i * width + j - 1]! > table[(i - 1) * width + j]!) j--
    else i--
  }
  return places
}

/**
 * ROUGE-Lsum, section 3.2 of the paper: for each sentence of the reference the union over the prediction's sentences; and as
 * in ROUGE-1.5.5 no word counts more often than either text has it.
 */
function summaryLevel(target: readonly (readonly string[])[], guess: readonly (readonly string[])[]): RougeScore {
  const inTarget = countOf(target.flat())
  const inGuess = countOf(guess.flat())
  let hits = 0
  for (const sentence of target) {
    const union = new Set(guess.flatMap((other) => commonPlaces(sentence, other)))
    for (const place of [...union].sort((a, b) => a - b)) {
      const word = sentence[place]!
      const [left, other] = [inTarget.get(word)!, inGuess.get(word)!]
      if (left === 0 || other === 0) continue
      hits++
      inTarget.set(word, left - 1)
      inGuess.set(word, other - 1)
    }
  }
  return score(hits, target.flat().length, guess.flat().length)
}
