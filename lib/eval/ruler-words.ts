// What RULER's prompts are made of: numbers, uuids, keys of two words, and words that nobody has seen before.
import { uniform } from '../model/generate.js'

const words = (text: string): readonly string[] => text.split(' ')

const ADJECTIVES = words(
  'able bold brave brief bright broad calm clean clear clever cold cool crisp curly damp dark deep dry eager early empty ' +
    'fair famous fast firm flat fresh full gentle glad golden good grand great green happy heavy hollow honest hot humble ' +
    'kind large late light little lively long loose loud lucky mellow merry mild narrow neat new noble odd old plain proud ' +
    'quick quiet rare ready rich ripe rough round royal sharp shiny short silent simple slow small smooth soft solid spare ' +
    'steady still strong sweet swift tall tame tender thick thin tidy tiny vast warm wide wild wise young',
)
const NOUNS = words(
  'acorn anchor apple apron arrow badge bakery barrel basket beach beacon bell bench berry blanket boat bottle bridge ' +
    'brook broom bucket button cabin camel candle canyon carpet castle cedar cellar chair cherry circle cliff clock cloud ' +
    'coast comet copper corner cotton cradle crane crystal curtain desert dragon drum eagle engine falcon feather fence ' +
    'field flame flute forest fountain garden ginger glove grain hammer harbor harvest helmet hill honey horn island ' +
    'jacket jewel journey kettle kitten ladder lagoon lamp lantern leaf lemon letter lion magnet maple market meadow ' +
    'melon mirror mountain needle nest novel ocean olive onion orchard otter paddle palace parcel parrot pebble pencil ' +
    'pepper piano pigeon pillow planet pocket pony puzzle quilt rabbit raven ribbon river rocket saddle sailor salmon ' +
    'shadow shell shield shovel signal spider sponge spring squirrel stable statue stone summit table tailor temple ' +
    'thunder ticket timber tower tractor trumpet tulip tunnel turtle valley velvet village violin wagon walnut whale ' +
    'whistle willow window winter wizard yard',
)

/** English words, none of which is a part of another. */
export const ENGLISH: readonly string[] = [...ADJECTIVES, ...NOUNS].filter(
  (word, _, all) => !all.some((other) => other !== word && other.includes(word)),
)

const CONSONANTS = 'bcdfghjklmnprstvz'
const VOWELS = 'aeiou'

/** Random draws from a seed. */
export class Draw {
  readonly next: () => number

  constructor(seed: number) {
    this.next = uniform(seed)
  }

  /** A whole number in [0, n). */
  below(n: number): number {
    return Math.floor(this.next() * n)
  }

  pick<T>(list: ArrayLike<T>): T {
    return list[this.below(list.length)]!
  }

  /** `count` different numbers in [0, n), in the order they were drawn. */
  distinct(count: number, n: number): number[] {
    const drawn = new Set<number>()
    while (drawn.size < count) drawn.add(this.below(n))
    return [...drawn]
  }

  shuffle<T>(list: T[]): T[] {
    for (let i = list.length - 1; i > 0; i--) {
      const j = this.below(i + 1)
      ;[list[i], list[j]] = [list[j]!, list[i]!]
    }
    return list
  }

  /** Calls `draw` until it has given `count` different texts, none of them in `without`. */
  different(count: number, draw: () => string, without: Iterable<string> = []): string[] {
    const seen = new Set(without)
    const drawn: string[] = []
    while (drawn.length < count) {
      const text = draw()
      if (seen.has(text)) continue
      seen.add(text)
      drawn.push(text)
    }
    return drawn
  }

  /** Seven digits. */
  number = (): string => String(1_000_000 + this.below(9_000_000))

  /** A random uuid (version 4). */
  uuid = (): string => {
    const digits = Array.from({ length: 32 }, () => this.below(16).toString(16))
    digits[12] = '4'
    digits[16] = (8 + this.below(4)).toString(16)
    return [...[digits.slice(0, 8), digits.slice(8, 12), digits.slice(12, 16), digits.slice(16, 20), digits.slice(20)]]
      .map((part) => part.join(''))
      .join('-')
  }

  /** Such as brave-otter: one of 15,900. */
  key = (): string => `${this.pick(ADJECTIVES)}-${this.pick(NOUNS)}`

  letters = (count: number, alphabet: string): string =>
    Array.from({ length: count }, () => this.pick(alphabet)).join('')

  /** Three syllables of a consonant and a vowel: one of 614,125, all of one length, so that none contains another. */
  syllables = (): string => Array.from({ length: 3 }, () => this.pick(CONSONANTS) + this.pick(VOWELS)).join('')
}
