import type { Tokenizer } from '../files/tokenizer.js'
import { uniform } from '../model/generate.js'

/**
 * The demo's texts, made up word by word from a seed:
 *
 * - prose about a few people. Each has a name and eight facts of two random words ("Mara keeps a grey otter."), and facts
 *   come again and again: who has read more of the text can predict more of it;
 * - passkey documents, the paper's retrieval test (as in lib/eval/passkey.ts);
 * - refrains, a random list of words recited over and over: the densest lesson in copying there is.
 *
 * Texts are built from pieces, a word with the space before it each, which the tokenizer never joins. So each piece is
 * encoded once, and a million tokens cost no more than their random numbers.
 */

const words = (text: string): readonly string[] => text.split(' ')

const NAMES = words(
  'Mara Ivo Lena Otto Nina Paul Rosa Emil Clara Hugo Vera Adam Ella Finn Greta Igor Jana Karl Luca Mila Noah Olga Pia ' +
    'Rolf Sara Tom Uma Viktor Wanda Yann Zoe Ben',
)
export const QUALITIES = words(
  'grey old red small bright dark young soft green cold heavy quiet blue wild thin warm golden broken white rare plain ' +
    'round proud dusty sweet black clean rough silver tall empty strange',
)
/** What is said of a person: the words around a quality and one of the nouns. */
export const FACTS: readonly { verb: readonly string[]; nouns: readonly string[] }[] = [
  { verb: words('keeps a'), nouns: words('cat dog horse goat crow otter fox hen') },
  { verb: words('lives near the'), nouns: words('bridge lake mill forest harbour tower garden market') },
  { verb: words('wears a'), nouns: words('coat hat scarf ring shirt belt cloak mask') },
  { verb: words('works with'), nouns: words('stone wood glass iron wool paper clay leather') },
  { verb: words('likes'), nouns: words('bread soup cheese apples honey fish rice tea') },
  { verb: words('plays the'), nouns: words('drum flute harp horn violin piano bell lute') },
  { verb: words('fears every'), nouns: words('storm wolf river snake mirror ghost night fire') },
  { verb: words('lost a'), nouns: words('key map book knife letter coin lamp wheel') },
]
const OPENERS = [
  words('Today'),
  words('They say that'),
  words('It is known that'),
  words('As we heard ,'),
  words('Of course ,'),
]
const TITLE = words('People of the town :')
const REFRAIN = words('A refrain :')
const RECITED = [...QUALITIES, ...FACTS.flatMap(({ nouns }) => nouns)]

const TASK =
  'There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about ' +
  'the important information there.'
const FILLER = 'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.'
const QUESTION = 'What is the pass key? The pass key is'

/** Where the tokenizer divides a text before it looks for tokens. */
export const PIECE = / ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+/gu

/** A source of random numbers in [0, 1), and what the texts need of it. */
export class Dice {
  readonly next: () => number

  constructor(seed: number) {
    this.next = uniform(seed)
  }

  /** A whole number in [0, n). */
  below(n: number): number {
    return Math.floor(this.next() * n)
  }

  pick<T>(list: readonly T[]): T {
    return list[this.below(list.length)]!
  }

  /** `n` different entries. */
  some<T>(list: readonly T[], n: number): T[] {
    const rest = [...list]
    return Array.from({ length: Math.min(n, rest.length) }, () => rest.splice(this.below(rest.length), 1)[0]!)
  }
}

/** Somebody with a quality and a noun for each kind of fact. */
export interface Person {
  name: string
  facts: readonly (readonly [quality: string, noun: string])[]
}

/** So many persons with different names. */
export const persons = (dice: Dice, count: number): Person[] =>
  dice.some(NAMES, count).map((name) => ({
    name,
    facts: FACTS.map(({ nouns }) => [dice.pick(QUALITIES), dice.pick(nouns)] as const),
  }))

/** An endless text about `people` persons, as pieces. */
export const prose = (dice: Dice, people: number): Generator<string, never> => tell(dice, persons(dice, people))

/** What is known of these persons, in any order, again and again, as pieces. */
export function* tell(dice: Dice, list: readonly Person[]): Generator<string, never> {
  yield* piecesOf(TITLE, true)
  for (;;) {
    const { name, facts } = dice.pick(list)
    const fact = dice.below(FACTS.length)
    if (dice.next() < 0.2) yield* piecesOf(dice.pick(OPENERS))
    yield* piecesOf([name, ...FACTS[fact]!.verb, ...facts[fact]!])
    yield '.'
  }
}

/** A list of words, or of numbers, of about `length` tokens, recited without end, as pieces. */
export function* refrain(dice: Dice, length: number): Generator<string, never> {
  yield* piecesOf(REFRAIN, true)
  const numbers = dice.next() < 0.3
  const list = numbers
    ? Array.from({ length: Math.ceil(length / 6) }, () => ` ${randomKey(dice)}`.match(PIECE)!).flat()
    : [...piecesOf(dice.some(RECITED, length))]
  for (;;) yield* list
}

const randomKey = (dice: Dice): string => String(10000 + dice.below(90000))

/** Words as pieces: a space goes before each but marks, and the first of a text. */
function* piecesOf(list: readonly string[], first = false): Generator<string> {
  for (const [i, word] of list.entries()) yield (first && i === 0) || /^[,:]$/.test(word) ? word : ` ${word}`
}

export interface PasskeyPrompt {
  /** The prompt, up to where the answer begins. */
  ids: number[]
  /** The key as it must follow: a space and five digits, a token each. */
  answer: number[]
  /** From the key's first token to the end of the prompt, in tokens. */
  distance: number
}

/** What a window of training tokens may hold. */
export interface Mixture {
  /** Persons in a prose text, from and to. */
  people: readonly [number, number]
  /** Shares of windows; the others are prose. */
  passkeys: number
  refrains: number
  /** Passkey documents of all lengths follow each other in a window; else one fills it. */
  packed?: boolean
}

/** The texts as token ids, cut to windows. */
export class Corpus {
  private readonly known = new Map<string, readonly number[]>()
  private readonly bos: number
  /** Tokens of a prompt without filler, with its answer, and of one repetition of the filler. */
  private readonly bare: number
  private readonly unit: number

  constructor(private readonly tokenizer: Pick<Tokenizer, 'encode' | 'bosId'>) {
    if (tokenizer.bosId === undefined) throw new TypeError('the tokenizer has no beginning-of-sequence token')
    this.bos = tokenizer.bosId
    // Two to spare: the first filler of a line begins with a piece of its own.
    this.bare = this.passkey('12345', 0, 0).ids.length + 6 + 2
    this.unit = this.passkey('12345', 2, 0).ids.length - this.passkey('12345', 1, 0).ids.length
  }

  /** A text of `length` tokens about `people` persons. */
  prose(dice: Dice, people: number, length: number): number[] {
    return this.take(prose(dice, people), length)
  }

  refrain(dice: Dice, words: number, length: number): number[] {
    return this.take(refrain(dice, words), length)
  }

  /** The paper's prompt with a random key and as much filler as `length` tokens can hold, answer included. */
  prompt(dice: Dice, length: number, where = dice.next()): PasskeyPrompt {
    const key = randomKey(dice)
    const total = Math.floor((length - this.bare) / this.unit)
    if (total < 0) throw new RangeError(`a passkey prompt needs ${this.bare} tokens, there are ${length}`)
    const after = Math.min(total, Math.floor(where * (total + 1)))
    return this.passkey(key, total - after, after)
  }

  /** A row of `length` training tokens. */
  window(dice: Dice, length: number, { people, passkeys, refrains, packed }: Mixture): number[] {
    const kind = dice.next()
    const persons = people[0] + dice.below(people[1] - people[0] + 1)
    if (kind < passkeys)
      return packed
        ? this.prompts(dice, persons, length)
        : this.fill(this.promptAndAnswer(dice, length), dice, persons, length)
    if (kind < passkeys + refrains) return this.refrain(dice, 4 + dice.below(Math.min(36, length / 4)), length)
    return this.prose(dice, persons, length)
  }

  /** Passkey documents of random lengths, more short than long ones, as many as there is room for. */
  private prompts(dice: Dice, people: number, length: number): number[] {
    const row: number[] = []
    for (let room = length; room >= this.bare; room = length - row.length) {
      row.push(...this.promptAndAnswer(dice, this.bare + Math.floor(dice.next() ** 2 * (room - this.bare + 1))))
    }
    return this.fill(row, dice, people, length)
  }

  private promptAndAnswer(dice: Dice, length: number): number[] {
    const { ids, answer } = this.prompt(dice, length)
    return [...ids, ...answer]
  }

  /** Prose after what a row holds. */
  private fill(row: readonly number[], dice: Dice, people: number, length: number): number[] {
    return row.length < length ? [...row, ...this.prose(dice, people, length - row.length)] : [...row]
  }

  /** The prompt with the filler `before` and `after` times around the key; the same tokens as of passkeyPrompt. */
  private passkey(key: string, before: number, after: number): PasskeyPrompt {
    const line = `The pass key is ${key}. Remember it. ${key} is the pass key.`
    const ids = [this.bos]
    const add = (text: string): void => {
      for (const piece of text.match(PIECE)!) ids.push(...this.encode(piece))
    }
    const filler = (times: number): void => {
      for (let n = 0; n < times; n++) add(`${n === 0 ? '\n' : ' '}${FILLER}`)
    }
    add(TASK)
    filler(before)
    const start = ids.length
    add(`\n${line}`)
    filler(after)
    add(`\n${QUESTION}`)
    const answer = ` ${key}`.match(PIECE)!.flatMap((piece) => this.encode(piece))
    // Before the key stand the line's end, four words and a space.
    return { ids, answer, distance: ids.length - (start + 6) }
  }

  private take(pieces: Iterable<string>, length: number): number[] {
    const ids = [this.bos]
    for (const piece of pieces) {
      if (ids.length >= length) break
      ids.push(...this.encode(piece))
    }
    return ids.slice(0, length)
  }

  private encode(piece: string): readonly number[] {
    let ids = this.known.get(piece)
    if (!ids) this.known.set(piece, (ids = this.tokenizer.encode(piece, { addSpecialTokens: false })))
    return ids
  }
}

/** Text for the tokenizer's training, with every word of every kind of document. */
export function sampleText(seed: number, sentences: number): string {
  const dice = new Dice(seed)
  const parts = [TASK, FILLER, QUESTION, 'The pass key is . Remember it. is the pass key.', REFRAIN.join(' ')]
  let text = ''
  for (let n = 0; n < sentences; n++) {
    let length = 0
    for (const piece of prose(dice, 8)) {
      text += piece
      if (++length > 200) break
    }
    text += `\n${parts.join('\n')}\n`
  }
  return text
}
