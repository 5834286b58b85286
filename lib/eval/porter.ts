/** What a rule asks of the stem that it leaves. */
type Condition = (stem: string) => boolean
/** Ending, what takes its place, and when. */
type Rule = readonly [ending: string, replacement: string, condition?: Condition]

/** Words that the rules would tear apart or keep apart, and their stems. */
const IRREGULAR: Readonly<Record<string, string>> = {
  sky: 'sky',
  skies: 'sky',
  dying: 'die',
  lying: 'lie',
  tying: 'tie',
  news: 'news',
  inning: 'inning',
  innings: 'inning',
  outing: 'outing',
  outings: 'outing',
  canning: 'canning',
  cannings: 'canning',
  howe: 'howe',
  proceed: 'proceed',
  exceed: 'exceed',
  succeed: 'succeed',
}

/** A letter other than a, e, i, o, u, and y except after a consonant. */
function isConsonant(word: string, at: number): boolean {
  const letter = word[at]!
  if ('aeiou'.includes(letter)) return false
  return letter !== 'y' || at === 0 || !isConsonant(word, at - 1)
}

/** c and v for each letter. */
const shape = (word: string): string => Array.from(word, (_, at) => (isConsonant(word, at) ? 'c' : 'v')).join('')

/** Porter's m: how many times vowels are followed by consonants. */
const measure = (word: string): number => shape(word).split('vc').length - 1

const doubleConsonant = (word: string): boolean =>
  word.length >= 2 && word.at(-1) === word.at(-2) && isConsonant(word, word.length - 1)

/** Porter's *o: ends in consonant, vowel, consonant, the last not w, x or y; or is a vowel and a consonant. */
function endsShort(word: string): boolean {
  const letters = shape(word)
  return (letters.endsWith('cvc') && !/[wxy]$/.test(word)) || letters === 'vc'
}

const positive: Condition = (stem) => measure(stem) > 0
const aboveOne: Condition = (stem) => measure(stem) > 1

/** The first rule whose ending fits decides, also where its condition does not hold. */
function apply(word: string, rules: readonly Rule[]): string {
  for (const [ending, replacement, condition] of rules) {
    if (!word.endsWith(ending)) continue
    const stem = word.slice(0, word.length - ending.length)
    return !condition || condition(stem) ? stem + replacement : word
  }
  return word
}

const PLURALS: readonly Rule[] = [
  ['sses', 'ss'],
  ['ies', 'i'],
  ['ss', 'ss'],
  ['s', ''],
]

const NOUNS: readonly Rule[] = [
  ['ational', 'ate', positive],
  ['tional', 'tion', positive],
  ['enci', 'ence', positive],
  ['anci', 'ance', positive],
  ['izer', 'ize', positive],
  ['bli', 'ble', positive],
  ['alli', 'al', positive],
  ['entli', 'ent', positive],
  ['eli', 'e', positive],
  ['ousli', 'ous', positive],
  ['ization', 'ize', positive],
  ['ation', 'ate', positive],
  ['ator', 'ate', positive],
  ['alism', 'al', positive],
  ['iveness', 'ive', positive],
  ['fulness', 'ful', positive],
  ['ousness', 'ous', positive],
  ['aliti', 'al', positive],
  ['iviti', 'ive', positive],
  ['biliti', 'ble', positive],
  ['fulli', 'ful', positive],
  // The l counts as part of the stem, so that "geology" is shortened like "archaeology".
  ['logi', 'log', (stem) => positive(`${stem}l`)],
]

const ADJECTIVES: readonly Rule[] = [
  ['icate', 'ic', positive],
  ['ative', '', positive],
  ['alize', 'al', positive],
  ['iciti', 'ic', positive],
  ['ical', 'ic', positive],
  ['ful', '', positive],
  ['ness', '', positive],
]

const LAST: readonly Rule[] = [
  ...['al', 'ance', 'ence', 'er', 'ic', 'able', 'ible', 'ant', 'ement', 'ment', 'ent'].map((ending): Rule => [
    ending,
    '',
    aboveOne,
  ]),
  ['ion', '', (stem) => aboveOne(stem) && /[st]$/.test(stem)],
  ...['ou', 'ism', 'ate', 'iti', 'ous', 'ive', 'ize'].map((ending): Rule => [ending, '', aboveOne]),
]

/** Steps 1a to 1c: plurals, -ed and -ing, y to i. */
function inflection(word: string): string {
  const plural = /^.ies$/.test(word) ? word.slice(0, -1) : apply(word, PLURALS)
  const base = past(plural)
  return apply(base, [['y', 'i', (stem) => stem.length > 1 && isConsonant(stem, stem.length - 1)]])
}

function past(word: string): string {
  if (word.endsWith('ied')) return word.slice(0, word.length === 4 ? -1 : -2)
  if (word.endsWith('eed')) return apply(word, [['eed', 'ee', positive]])
  const ending = ['ed', 'ing'].find((one) => word.endsWith(one) && shape(word.slice(0, -one.length)).includes('v'))
  if (ending === undefined) return word
  const stem = word.slice(0, -ending.length)
  if (/(at|bl|iz)$/.test(stem)) return `${stem}e`
  if (doubleConsonant(stem)) return /[lsz]$/.test(stem) ? stem : stem.slice(0, -1)
  return measure(stem) === 1 && endsShort(stem) ? `${stem}e` : stem
}

/** Step 2. -ally becomes -al first, so that what lies before it is seen as well. */
function nouns(word: string): string {
  if (word.endsWith('alli') && positive(word.slice(0, -4))) return nouns(word.slice(0, -2))
  return apply(word, NOUNS)
}

/** Steps 5a and 5b: a last e, and one of two l. */
function tidy(word: string): string {
  let result = word
  if (result.endsWith('e')) {
    const stem = result.slice(0, -1)
    if (aboveOne(stem) || (measure(stem) === 1 && !endsShort(stem))) result = stem
  }
  return result.endsWith('ll') && aboveOne(result.slice(0, -1)) ? result.slice(0, -1) : result
}

/**
 * The stem of a lower-case word: M. Porter, "An algorithm for suffix stripping", Program 14.3 (1980), with Porter's later
 * changes and those of nltk's default mode (NLTK_EXTENSIONS), which rouge_score uses.
 */
export function porterStem(word: string): string {
  if (Object.hasOwn(IRREGULAR, word)) return IRREGULAR[word]!
  if (word.length <= 2) return word
  return tidy(apply(apply(nouns(inflection(word)), ADJECTIVES), LAST))
}
