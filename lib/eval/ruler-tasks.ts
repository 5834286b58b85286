// RULER's tasks (arXiv 2404.06654): prompts of any size from a seed. The wording of templates, the numbers of needles,
// hops and words, the share of each word and the tokens of an answer are those of NVIDIA/RULER (scripts/synthetic.yaml,
// scripts/data/synthetic); the random draws are our own.
import { type Draw, ENGLISH } from './ruler-words.js'

/**
 * A task of RULER; see {@link ruler}.
 *
 * @category Evaluation
 */
export type RulerTask =
  | 'niah_single_1'
  | 'niah_single_2'
  | 'niah_single_3'
  | 'niah_multikey_1'
  | 'niah_multikey_2'
  | 'niah_multikey_3'
  | 'niah_multivalue'
  | 'niah_multiquery'
  | 'vt'
  | 'cwe'
  | 'fwe'

/** RULER's retrieval, tracing and aggregation tasks, in its order. */
export const rulerTasks: readonly RulerTask[] = [
  'niah_single_1',
  'niah_single_2',
  'niah_single_3',
  'niah_multikey_1',
  'niah_multikey_2',
  'niah_multikey_3',
  'niah_multivalue',
  'niah_multiquery',
  'vt',
  'cwe',
  'fwe',
]

/** What prompts are made from. */
export interface Material {
  /** Prompt and answer, in tokens. */
  context: number
  /** Solved examples before the question of vt and cwe. */
  shots: 0 | 1
  /** Words of the text that needles are hidden in; undefined for RULER's sentence of noise. */
  text: readonly string[] | undefined
  /** What cwe lists; undefined for English words and, where there are too few, made-up ones. */
  words: readonly string[] | undefined
  /** Number of tokens of a text. */
  count(text: string): number
}

export interface RulerPrompt {
  text: string
  /** What a right answer contains. */
  references: string[]
}

/** How the prompts of a task are made. */
export interface Builder {
  /** Tokens of an answer, in RULER. */
  answerTokens: number
  /** The size of a prompt is the number of its sentences, words or needles, from `smallest` to `largest`. */
  smallest: number
  largest?: number
  build(draw: Draw, size: number): RulerPrompt
}

const NOISE = 'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.'
const EXAMPLE_TOKENS = 500

export function builderOf(task: RulerTask, material: Material): Builder {
  if (task === 'vt') return tracking(material)
  if (task === 'cwe') return commonWords(material)
  if (task === 'fwe') return frequentWords(material)
  return needles(NEEDLES[task], material)
}

interface Needles {
  /** `text` is noise where no text is given. */
  haystack: 'noise' | 'text' | 'needles'
  key: 'key' | 'uuid'
  value: 'number' | 'uuid'
  keys: number
  values: number
  queries: number
}

const plain: Needles = { haystack: 'text', key: 'key', value: 'number', keys: 1, values: 1, queries: 1 }
const NEEDLES: Record<Exclude<RulerTask, 'vt' | 'cwe' | 'fwe'>, Needles> = {
  niah_single_1: { ...plain, haystack: 'noise' },
  niah_single_2: plain,
  niah_single_3: { ...plain, value: 'uuid' },
  niah_multikey_1: { ...plain, keys: 4 },
  niah_multikey_2: { ...plain, haystack: 'needles' },
  niah_multikey_3: { ...plain, haystack: 'needles', key: 'uuid', value: 'uuid' },
  niah_multivalue: { ...plain, values: 4 },
  niah_multiquery: { ...plain, keys: 4, queries: 4 },
}

/** Needle in a haystack: "One of the special magic numbers for brave-otter is: 1234567." */
function needles({ haystack, key, value, keys, values, queries }: Needles, { text }: Material): Builder {
  const kind = value === 'uuid' ? 'uuids' : 'numbers'
  const needle = (key: string, value: string): string => `One of the special magic ${kind} for ${key} is: ${value}.`
  const [some, are, asked] = queries * values > 1 ? ['Some', 'are', kind] : ['A', 'is', kind.slice(0, -1)]
  const all = queries * values > 1 ? ' all' : ''
  const hidden = keys * values
  const essay = haystack === 'text' ? text : undefined
  return {
    answerTokens: 128,
    smallest: hidden,
    build(draw, size) {
      const names = draw.different(keys, draw[key])
      const numbers = draw.different(hidden, draw[value])
      const lines = draw.shuffle(numbers.map((number, n) => needle(names[Math.floor(n / values)]!, number)))
      let context: string
      if (essay) {
        context = hideInText(draw, essay, size, lines)
      } else {
        const other = (): string => needle(draw.different(1, draw[key], names)[0]!, draw[value]())
        const sentences = Array.from({ length: size }, () => (haystack === 'needles' ? other() : NOISE))
        context = hideInLines(draw, sentences, lines).join('\n')
      }
      const chosen = draw.distinct(queries, keys)
      const query = listed(chosen.map((n) => names[n]!))
      return {
        text:
          `${some} special magic ${asked} ${are} hidden within the following text. Make sure to memorize it. I will quiz ` +
          `you about the ${asked} afterwards.\n${context}\nWhat ${are}${all} the special magic ${asked} for ${query} ` +
          `mentioned in the provided text? The special magic ${asked} for ${query} mentioned in the provided text ${are}`,
        references: chosen.flatMap((n) => numbers.slice(n * values, (n + 1) * values)),
      }
    },
  }
}

const listed = (names: readonly string[]): string =>
  names.length > 1 ? `${names.slice(0, -1).join(', ')}, and ${names.at(-1)}` : names[0]!

/** Puts the lines, in their order, before different ones of the sentences. */
function hideInLines(draw: Draw, sentences: readonly string[], lines: readonly string[]): string[] {
  const at = draw.distinct(lines.length, sentences.length).sort((a, b) => a - b)
  const next = [...lines]
  return sentences.flatMap((sentence, i) => (at.includes(i) ? [next.shift()!, sentence] : [sentence]))
}

/** The first `size` words of a text, from its start again where it ends, with lines between its sentences. */
function hideInText(draw: Draw, text: readonly string[], size: number, lines: readonly string[]): string {
  const sentences: string[][] = [[]]
  for (let i = 0; i < size; i++) {
    const word = text[i % text.length]!
    if (/[.!?]["')\]]*$/.test(sentences.at(-1)!.at(-1) ?? '')) sentences.push([])
    sentences.at(-1)!.push(word)
  }
  // 40 depths, from the beginning to the end
  const depths = draw.distinct(lines.length, 40).sort((a, b) => a - b)
  const at = depths.map((depth) => Math.floor((sentences.length * Math.round((100 * depth) / 39)) / 100))
  const parts: string[] = []
  for (let s = 0, n = 0; s <= sentences.length; s++) {
    while (n < at.length && at[n] === s) parts.push(lines[n++]!)
    if (s < sentences.length) parts.push(sentences[s]!.join(' '))
  }
  return parts.join(' ')
}

const HOPS = 4

/** Variable tracking: VAR A = 12345, VAR B = VAR A ...; which variables have the value 12345? */
function tracking({ shots, count }: Material): Builder {
  const question = (draw: Draw, size: number, letters: number): RulerPrompt => {
    const names = draw.different(HOPS + 1, () => draw.letters(letters, 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'))
    const value = String(10_000 + draw.below(90_000))
    const chain = names.map((name, n) => `VAR ${name} = ${n === 0 ? value : `VAR ${names[n - 1]} `}`)
    const context = hideInLines(draw, Array<string>(size).fill(NOISE), chain).join('\n')
    return {
      text:
        'Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n' +
        `${context}\nQuestion: Find all variables that are assigned the value ${value} in the text above. Answer: ` +
        `According to the chain(s) of variable assignment in the text above, ${names.length} variables are assigned ` +
        `the value ${value}, they are: `,
      references: names,
    }
  }
  const solved = (draw: Draw, size: number): string => {
    const { text, references } = question(draw, size, 3)
    return `${text} ${references.join(' ')}\n\n`
  }
  let example = 0
  return {
    answerTokens: 30,
    smallest: HOPS + 1,
    build(draw, size) {
      if (shots === 0) return question(draw, size, 5)
      if (example === 0) {
        const tokens = (n: number): number => count(question(draw, n, 3).text)
        for (example = HOPS + 1; tokens(example + 1) <= EXAMPLE_TOKENS; example++);
      }
      const before = solved(draw, example)
      const { text, references } = question(draw, size, 5)
      return { text: before + text, references }
    },
  }
}

const COMMON = 10
/** Contexts of fewer tokens have shorter lists. */
const LONG = 4096

/** Common words: of a numbered list of words, which are the ten that stand in it most often? */
function commonWords({ context, shots, words }: Material): Builder {
  const long = context >= LONG
  const numbered = (list: readonly string[]): string => list.map((word, i) => `${i + 1}. ${word}`).join(' ')
  const question = (draw: Draw, size: number, often: number, seldom: number): RulerPrompt => {
    const made = draw.different(words ? 0 : Math.max(0, size - ENGLISH.length), draw.syllables)
    const known = [...(words ?? ENGLISH), ...made]
    const chosen = draw.distinct(size, known.length).map((n) => known[n]!)
    const list = chosen.flatMap((word, i) => Array<string>(i < COMMON ? often : seldom).fill(word))
    return {
      text:
        'Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that ' +
        `appear most often.\n${numbered(draw.shuffle(list))}\nQuestion: What are the 10 most common words in the above ` +
        'list? Answer: The top 10 words that appear most often in the list are:',
      references: chosen.slice(0, COMMON),
    }
  }
  return {
    answerTokens: 120,
    smallest: COMMON + 1,
    ...(words && { largest: words.length }),
    build(draw, size) {
      const example = long ? question(draw, 40, 10, 3) : question(draw, 20, 3, 1)
      const { text, references } = long ? question(draw, size, 30, 3) : question(draw, size, 6, 1)
      const before = shots === 0 ? '' : `${example.text} ${numbered(example.references)}`
      return { text: `${before}\n${text}`, references }
    },
  }
}

/** Words that a user's list needs: those of cwe's example. */
export const fewestWords = ({ context }: Pick<Material, 'context'>): number => (context >= LONG ? 40 : 20)

const CODE_LETTERS = 6

/** Frequent words: words of random letters, the k-th of which makes up k^-2 / zeta(2) of the text, the first being noise. */
function frequentWords({ context }: Material): Builder {
  const answerTokens = 50
  const vocabulary = Math.max(5, Math.floor((context - answerTokens) / 50))
  return {
    answerTokens,
    // From here on the fourth word stands there more often than the fifth.
    smallest: 74,
    build(draw, size) {
      const coded = draw.different(vocabulary - 1, () => draw.letters(CODE_LETTERS, 'abcdefghijklmnopqrstuvwxyz'))
      const text = ['...', ...coded].flatMap((word, k) =>
        Array<string>(Math.floor((size * 6) / (Math.PI * (k + 1)) ** 2)).fill(word),
      )
      return {
        text:
          'Read the following coded text and track the frequency of each coded word. Find the three most frequently ' +
          `appeared coded words. ${draw.shuffle(text).join(' ')}\nQuestion: Do not provide any explanation. Please ignore ` +
          "the dots '....'. What are the three most frequently appeared words in the above coded text? Answer: According " +
          'to the coded text above, the three most frequently appeared words are:',
        references: coded.slice(0, 3),
      }
    },
  }
}
