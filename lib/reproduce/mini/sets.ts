import { Dice, FACTS, type Person, persons, QUALITIES, tell } from '../../demo/data.js'
import { type Settings, windowOf } from '../settings.js'
import type { Writer } from './texts.js'

/**
 * The miniature's questions and articles, about people whose facts stand in the text before: in the formats of BoolQ, PIQA,
 * RACE, WinoGrande and GovReport, so that the readers of those read them. Answers can be found in the text, by copying.
 */

/** Share of the original window that a question's text takes, its longest answers left room for. */
const PASSAGE = { boolq: 0.45, piqa: 0.45, 'race-m': 0.4, 'race-h': 0.75, winogrande: 0.5 } as const
const PEOPLE = { boolq: 2, piqa: 2, 'race-m': 2, 'race-h': 4, winogrande: 2 } as const
type SetName = keyof typeof PASSAGE

interface Story {
  text: string
  people: Person[]
  /** Facts that the text tells: index of the person and of the fact. */
  told: { person: Person; fact: number }[]
}

const clause = ({ facts }: Person, fact: number): string => `${FACTS[fact]!.verb.join(' ')} ${facts[fact]!.join(' ')}`
const sentence = (person: Person, fact: number): string => `${person.name} ${clause(person, fact)}.`

/** A story of at most `tokens` tokens that ends with a sentence, and what it tells. */
function story(dice: Dice, writer: Writer, people: Person[], tokens: number): Story {
  const pieces = tell(dice, people)
  let text = ''
  let line = ''
  for (const piece of pieces) {
    line += piece
    if (piece !== '.') continue
    if (text !== '' && writer.tokens(text + line) > tokens) break
    text += line
    line = ''
  }
  const told = people.flatMap((person) => FACTS.map((_, fact) => ({ person, fact })))
  return { text, people, told: told.filter(({ person, fact }) => text.includes(sentence(person, fact))) }
}

/** Another quality and noun of the same kind. */
function otherThing(dice: Dice, [quality, noun]: readonly [string, string], fact: number): string {
  for (;;) {
    const [a, b] = [dice.pick(QUALITIES), dice.pick(FACTS[fact]!.nouns)]
    if (a !== quality && b !== noun) return `${a} ${b}`
  }
}

export function choiceSets(settings: Settings, writer: Writer, window: number): Record<SetName, () => object[]> {
  const items = settings.choiceItems ?? 0
  const of = (name: SetName, number: number, make: (dice: Dice, story: Story) => object) => () => {
    const dice = new Dice(10_000 * settings.seed + 700 + number)
    return Array.from({ length: items }, () => {
      const people = persons(dice, PEOPLE[name])
      return make(dice, story(dice, writer, people, Math.floor(PASSAGE[name] * window)))
    })
  }
  /** Four things to choose from, one of them right. */
  const options = (dice: Dice, { person, fact }: Story['told'][number]) => {
    const right = person.facts[fact]!.join(' ')
    const wrong = new Set<string>()
    while (wrong.size < 3) wrong.add(otherThing(dice, person.facts[fact]!, fact))
    const answer = dice.below(4)
    const list = [...wrong]
    list.splice(answer, 0, right)
    return { list, answer: 'ABCD'[answer]! }
  }
  const race = (dice: Dice, { text, told }: Story): object => {
    const asked = dice.pick(told)
    const { list, answer } = options(dice, asked)
    const question = `${asked.person.name} ${FACTS[asked.fact]!.verb.join(' ')}`
    return { article: text, question, options: list, answer }
  }
  return {
    boolq: of('boolq', 0, (dice, { text, told }) => {
      const { person, fact } = dice.pick(told)
      const answer = dice.next() < 0.5
      const thing = answer ? person.facts[fact]!.join(' ') : otherThing(dice, person.facts[fact]!, fact)
      const question = `is it known that ${person.name} ${FACTS[fact]!.verb.join(' ')} ${thing}`
      return { passage: text, question, answer }
    }),
    piqa: of('piqa', 1, (dice, { text, told }) => {
      const { person, fact } = dice.pick(told)
      const things = [person.facts[fact]!.join(' '), otherThing(dice, person.facts[fact]!, fact)]
      const label = dice.below(2)
      const [sol1, sol2] = label === 0 ? things : things.reverse()
      return { goal: `${text} ${person.name} ${FACTS[fact]!.verb.join(' ')} what ?`, sol1, sol2, label }
    }),
    'race-m': of('race-m', 2, (dice, told) => ({ ...race(dice, told), example_id: 'middle.txt' })),
    'race-h': of('race-h', 3, (dice, told) => ({ ...race(dice, told), example_id: 'high.txt' })),
    winogrande: of('winogrande', 4, (dice, { text, people, told }) => {
      const { person, fact } = dice.pick(told)
      const other = people.find((one) => one !== person)!
      const answer = 1 + dice.below(2)
      const [option1, option2] = answer === 1 ? [person, other] : [other, person]
      const rest = `_ ${clause(person, fact)}.`
      return { sentence: `${text} ${rest}`, option1: option1.name, option2: option2.name, answer: String(answer) }
    }),
  }
}

/** People of an article; its summary has a sentence about each. */
const ARTICLE_PEOPLE = 3

export function govReport(settings: Settings, writer: Writer, window: number): Record<string, () => object[]> {
  const { summaries, seed } = settings
  const room = Math.min(summaries.articleTokens, windowOf(window, summaries.factor) - summaries.summaryTokens)
  const articles = (count: number, stream: number) => () => {
    const dice = new Dice(10_000 * seed + 800 + stream)
    return Array.from({ length: count }, () => {
      const people = persons(dice, ARTICLE_PEOPLE)
      // From half of the room on; the template takes the rest.
      const tokens = Math.floor((0.5 + 0.4 * dice.next()) * room)
      const { text, told } = story(dice, writer, people, tokens)
      const first = people.map((person) => told.find((one) => one.person === person)).filter((one) => one !== undefined)
      return { report: text, summary: first.map(({ person, fact }) => sentence(person, fact)).join(' ') }
    })
  }
  return {
    'gov-report': articles(summaries.test ?? 0, 0),
    'gov-report-train': articles(summaries.train ?? 0, 1),
  }
}
