import { readdir, readFile, stat } from 'node:fs/promises'
import { basename, extname, join } from 'node:path'
import { didYouMean, quote, RopewalkError } from '../errors.js'
import { isObject, type JsonValue, readJsonObject } from '../files/json.js'
import { fieldError, fieldOf, readRows, type Row, textField } from '../files/rows.js'
import { requireOnce } from '../files/text.js'

/**
 * The tasks that {@link readChoiceItems} reads.
 *
 * @category Evaluation
 */
export type ChoiceTask = 'boolq' | 'piqa' | 'race-m' | 'race-h' | 'winogrande'

/** In the order of the paper's table 5. */
export const choiceTasks = ['boolq', 'piqa', 'race-m', 'race-h', 'winogrande'] as const satisfies readonly ChoiceTask[]

/**
 * One question with its possible answers.
 *
 * @category Evaluation
 */
export interface ChoiceItem {
  /** Names it in messages and records: file, file:line or file#row. */
  source: string
  /** What the model reads and what is scored, for each choice. */
  requests: readonly {
    /** Read, not scored. */
    context: string
    /** Scored; begins with a space. */
    continuation: string
  }[]
  /** The choices' texts, whose lengths normalise `accNorm` and `accBytes`. */
  choices: readonly string[]
  /** Index of the right one. */
  gold: number
}

/** Reads the items of one file. `labels` is a line for each item. */
type Reader = (path: string, level: string, labels: readonly string[] | undefined) => AsyncGenerator<ChoiceItem>

const READERS: Record<ChoiceTask, { read: Reader; level?: 'middle' | 'high' }> = {
  boolq: { read: readBoolq },
  piqa: { read: readPiqa },
  'race-m': { read: readRace, level: 'middle' },
  'race-h': { read: readRace, level: 'high' },
  winogrande: { read: readWinogrande },
}

/**
 * Reads the items of a task from local files, in their order, with the prompts of EleutherAI's lm-evaluation-harness
 * (tasks boolq 2.0, piqa 1.0, race 3.0, winogrande 1.0). Files end in .jsonl or .parquet, RACE's also in .txt:
 *
 * | task | published files | fields; those of the mirrors in brackets |
 * |---|---|---|
 * | boolq | dev.jsonl | passage, question, answer true or false (label, also 0 or 1) |
 * | piqa | valid.jsonl and valid-labels.lst, which is `labels` | goal, sol1, sol2 (label 0 or 1) |
 * | race-m, race-h | folder of .txt, or one with the folders middle and high | article, questions, options, answers (a row a question: article, question, options, answer, example_id; or article and a list problems) |
 * | winogrande | dev.jsonl | sentence with _, option1, option2, answer 1 or 2 |
 *
 * As in the harness a RACE item is a whole article: its last question is scored, the ones before stand in the prompt with
 * their answers. Rows whose example_id is of the other level are left out.
 *
 * Throws TypeError or RangeError for arguments, RopewalkError: ERR_FIELD and ERR_FORMAT with file, line and field,
 * ERR_NO_TEXT where there is no item, and the codes of files.
 *
 * @category Evaluation
 */
export async function readChoiceItems(
  task: ChoiceTask,
  paths: readonly string[],
  options: { labels?: string; signal?: AbortSignal } = {},
): Promise<ChoiceItem[]> {
  if (!choiceTasks.includes(task)) {
    throw new RangeError(
      `task is ${quote(task)}, but must be one of ${choiceTasks.join(', ')}${didYouMean(String(task), choiceTasks)}`,
    )
  }
  if (!Array.isArray(paths) || paths.length === 0)
    throw new TypeError(`paths: ${quote(paths)}, but a list of paths is expected`)
  const labels = options.labels === undefined ? undefined : await readLabels(task, paths, options.labels)
  const { read, level = '' } = READERS[task]
  const items: ChoiceItem[] = []
  const files: string[] = []
  for (const path of paths) files.push(...(await filesOf(path, level)))
  requireOnce(files)
  for (const file of files) {
    for await (const item of read(file, level, labels)) {
      options.signal?.throwIfAborted()
      items.push(item)
    }
  }
  if (items.length === 0) {
    throw new RopewalkError('ERR_NO_TEXT', `${paths.join(', ')}: there is no item of ${task}: check the file`)
  }
  if (labels && labels.length !== items.length) {
    throw new RopewalkError(
      'ERR_FORMAT',
      `${options.labels}: ${labels.length} labels for the ${items.length} items of ${paths[0]}: they belong to another file`,
    )
  }
  return items
}

/** A file, or a folder's files; of a folder with RACE's levels those of one. */
async function filesOf(path: string, level: string): Promise<string[]> {
  const info = await stat(path).catch((cause: Error) => {
    throw new RopewalkError('ERR_NOT_FOUND', `${path}: cannot be read (${cause.message}): check the path`, { cause })
  })
  if (!info.isDirectory()) return [path]
  const names = await readdir(path)
  if (level !== '' && names.includes(level)) return filesOf(join(path, level), '')
  const endings =
    level === '' && !names.some((name) => name.endsWith('.txt'))
      ? ['.jsonl', '.parquet']
      : ['.txt', '.jsonl', '.parquet']
  const known = names.filter((name) => endings.includes(extname(name).toLowerCase()))
  // 2.txt before 10.txt, as the data sets count
  known.sort((a, b) => a.localeCompare(b, 'en', { numeric: true }))
  if (known.length === 0) {
    throw new RopewalkError(
      'ERR_EMPTY',
      `${path}: no file in this folder: files that end in ${endings.join(', ')} are read`,
    )
  }
  return known.map((name) => join(path, name))
}

async function readLabels(task: ChoiceTask, paths: readonly string[], path: string): Promise<string[]> {
  if (task !== 'piqa') throw new RangeError(`labels is ${quote(path)}, but the files of ${task} hold their answers`)
  if (paths.length > 1) throw new RangeError(`labels belong to one file, but paths has ${paths.length}`)
  const text = await readFile(path, 'utf8').catch((cause: Error) => {
    throw new RopewalkError('ERR_NOT_FOUND', `${path}: cannot be read (${cause.message}): check the path`, { cause })
  })
  const labels = text.split('\n').map((line) => line.trim())
  while (labels.at(-1) === '') labels.pop()
  labels.forEach((label, i) => {
    if (label !== '0' && label !== '1')
      throw new RopewalkError('ERR_FORMAT', `${path}:${i + 1}: ${quote(label)}, but a label is 0 or 1`)
  })
  return labels
}

/** The first of the fields that is there, one of which must be. */
function oneOf(row: Row, ...fields: string[]): [field: string, value: JsonValue] {
  const field = fields.find((name) => Object.hasOwn(row.fields, name)) ?? fields[0]!
  return [field, fieldOf(row, field)]
}

/** The index of the answer in `values`, each of which may be written in several ways. */
function answer(row: Row, fields: string[], ...values: JsonValue[][]): number {
  const [field, value] = oneOf(row, ...fields)
  const index = values.findIndex((ways) => ways.includes(value))
  if (index >= 0) return index
  const rule = values.map((ways) => quote(ways[0])).join(' or ')
  const hint = value === -1 || value === '' ? '; this is a test split, whose answers are not published' : ''
  throw fieldError(row.source, field, value, rule + hint)
}

const sharing = (context: string, choices: readonly string[]): ChoiceItem['requests'] =>
  choices.map((choice) => ({ context, continuation: ` ${choice}` }))

async function* readBoolq(path: string): AsyncGenerator<ChoiceItem> {
  for await (const row of readRows(path, ['passage', 'question', 'answer', 'label'])) {
    const [passage, question] = [textField(row, 'passage'), textField(row, 'question')]
    const choices = ['no', 'yes']
    const gold = answer(row, ['answer', 'label'], [false, 0], [true, 1])
    const context = `${passage}\nQuestion: ${question}?\nAnswer:`
    yield { source: row.source, requests: sharing(context, choices), choices, gold }
  }
}

async function* readPiqa(path: string, _: string, labels: readonly string[] | undefined): AsyncGenerator<ChoiceItem> {
  let count = 0
  for await (const row of readRows(path, ['goal', 'sol1', 'sol2', 'label'])) {
    const choices = [textField(row, 'sol1'), textField(row, 'sol2')]
    const label = labels?.[count++]
    if (label === undefined && !Object.hasOwn(row.fields, 'label')) {
      const what = labels
        ? `the file of labels has only ${labels.length}`
        : 'PIQA has them in a file of their own: give labels'
      throw new RopewalkError('ERR_FIELD', `${row.source}: no field "label", and ${what}`)
    }
    const gold = label === undefined ? answer(row, ['label'], [0], [1]) : Number(label)
    const context = `Question: ${textField(row, 'goal')}\nAnswer:`
    yield { source: row.source, requests: sharing(context, choices), choices, gold }
  }
}

/** The sentence up to the blank with each option in it; what follows the blank is scored after both ("partial" scoring). */
async function* readWinogrande(path: string): AsyncGenerator<ChoiceItem> {
  for await (const row of readRows(path, ['sentence', 'option1', 'option2', 'answer'])) {
    const sentence = textField(row, 'sentence')
    const blank = sentence.indexOf('_')
    if (blank < 0) throw fieldError(row.source, 'sentence', sentence, 'a sentence with the blank _')
    const choices = [textField(row, 'option1'), textField(row, 'option2')].map(
      (option) => sentence.slice(0, blank) + option,
    )
    const gold = answer(row, ['answer'], ['1', 1], ['2', 2])
    const continuation = ` ${stripPython(sentence.slice(blank + 1))}`
    const requests = choices.map((context) => ({ context, continuation }))
    yield { source: row.source, requests, choices, gold }
  }
}

/** RACE's articles have a few thousand. */
const maxRaceBytes = 16 << 20

interface Problem {
  question: string
  options: readonly string[]
  answer: number
}

/** RACE's items: an article and its questions, of a .txt file, of a row, or of the rows that share an article. */
async function* readRace(path: string, level: string): AsyncGenerator<ChoiceItem> {
  if (extname(path).toLowerCase() === '.txt') {
    const fields = await readJsonObject(path, { python: true, maxBytes: maxRaceBytes })
    const row: Row = { source: path, fields, names: Object.keys(fields) }
    const lists = ['questions', 'options', 'answers'].map((name) => listField(row, name)) as [
      JsonValue[],
      JsonValue[],
      JsonValue[],
    ]
    const [questions, options, answers] = lists
    if (options.length !== questions.length || answers.length !== questions.length) {
      const counts = `${questions.length} questions, ${options.length} options and ${answers.length} answers`
      throw new RopewalkError('ERR_FORMAT', `${path}: ${counts}, but each question needs one of both`)
    }
    const problems = questions.map((question, i) => problemOf(row, question, options[i]!, answers[i]!, `[${i}]`))
    yield raceItem(path, textField(row, 'article'), problems)
    return
  }
  // Rows of one article follow each other in the mirrors; the harness gathers them by the article's text.
  const articles = new Map<string, { source: string; problems: Problem[] }>()
  const columns = ['article', 'question', 'options', 'answer', 'problems', 'example_id']
  for await (const row of readRows(path, columns)) {
    const id = row.fields.example_id
    if (typeof id === 'string' && /^(middle|high)/.test(id) && !id.startsWith(level)) continue
    const article = textField(row, 'article')
    const known = articles.get(article) ?? { source: row.source, problems: [] }
    articles.set(article, known)
    if (Object.hasOwn(row.fields, 'problems')) {
      listField(row, 'problems').forEach((problem, i) => {
        if (!isObject(problem)) throw fieldError(row.source, `problems[${i}]`, problem, 'an object')
        const at = { ...row, fields: problem, names: Object.keys(problem), source: `${row.source}, problems[${i}]` }
        known.problems.push(rowProblem(at))
      })
    } else known.problems.push(rowProblem(row))
  }
  for (const [article, { source, problems }] of articles) yield raceItem(source, article, problems)
}

const rowProblem = (row: Row): Problem =>
  problemOf(row, fieldOf(row, 'question'), listField(row, 'options'), fieldOf(row, 'answer'), '')

function listField(row: Row, field: string): JsonValue[] {
  const value = fieldOf(row, field)
  if (Array.isArray(value)) return value
  throw fieldError(row.source, field, value, 'a list')
}

function problemOf(row: Row, question: JsonValue, options: JsonValue, answer: JsonValue, at: string): Problem {
  const many = at === '' ? '' : 's'
  if (typeof question !== 'string') throw fieldError(row.source, `question${many}${at}`, question, 'a string')
  const texts = Array.isArray(options) && options.length === 4 && options.every((option) => typeof option === 'string')
  if (!texts) throw fieldError(row.source, `options${at}`, options, 'a list of four strings')
  const index = typeof answer === 'string' ? ['A', 'B', 'C', 'D'].indexOf(answer) : -1
  if (index < 0) throw fieldError(row.source, `answer${many}${at}`, answer, '"A", "B", "C" or "D"')
  return { question, options: options as string[], answer: index }
}

function raceItem(source: string, article: string, problems: readonly Problem[]): ChoiceItem {
  const last = problems.at(-1)
  if (!last) throw new RopewalkError('ERR_FORMAT', `${source}: the article ${basename(source)} has no question`)
  let context = `Article: ${article}\n\n`
  for (const { question, options, answer } of problems.slice(0, -1)) {
    const right = options[answer]!
    // A sentence with a blank at its end is completed; all else is a question.
    if (question.endsWith('  _  .')) context += `${question.slice(0, -5)}${right}\n`
    else context += `Question: ${question}\nAnswer: ${right}\n`
  }
  context += last.question
  return { source, requests: sharing(context, last.options), choices: last.options, gold: last.answer }
}

/** What Python's str.strip takes for white space, which is not quite what JavaScript's trim does. */
const SPACE = '[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+'
const atEnd = new RegExp(`${SPACE}$`)
const atBegin = new RegExp(`^${SPACE}`)

const stripPython = (text: string): string => text.replace(atBegin, '').replace(atEnd, '')

/** The text without the white space at its end, and that space (Python's str.rstrip). */
export function splitTail(text: string): [head: string, tail: string] {
  const head = text.replace(atEnd, '')
  return [head, text.slice(head.length)]
}
