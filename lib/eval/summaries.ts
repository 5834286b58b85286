import { open, rename, rm } from 'node:fs/promises'
import { quote, RopewalkError } from '../errors.js'
import { temporaryName, writeAll, writeFailure } from '../files/durable.js'
import { readRows, textField } from '../files/rows.js'
import { documentFiles } from '../files/text.js'
import type { Tokenizer } from '../files/tokenizer.js'
import type { SamplingOptions } from '../model/generate.js'
import type { Llama } from '../model/llama.js'
import { rouge, type RougeScores, rougeTypes } from './rouge.js'

/**
 * An article with the summary that people wrote.
 *
 * @category Evaluation
 */
export interface SummaryArticle {
  /** Names it in messages and records: file:line or file#row. */
  source: string
  /** Its place in the data, from 0; with `seed` it decides what is sampled, whichever articles are summarised with it. */
  index: number
  /** The text to summarise. */
  article: string
  /** The summary to compare with. */
  summary: string
}

/**
 * How much of an article and of a summary is used.
 *
 * @category Evaluation
 */
export interface SummaryLimits {
  /** Tokens after which an article is cut; default 15000, as in the paper. */
  articleTokens?: number
  /** Tokens of a summary at most; default 1000, as in the paper. */
  summaryTokens?: number
}

/**
 * Options of {@link summarize}; sampling as in the paper unless given: temperature 0.5, topP 0.95.
 *
 * @category Evaluation
 */
export interface SummaryOptions extends SummaryLimits, SamplingOptions {
  /** Whether ROUGE compares Porter stems; default true. */
  stemmer?: boolean
  /** Ends the evaluation between two tokens; it rejects with the signal's reason. */
  signal?: AbortSignal
  /** Called after each token, and with `record` after each article. `tokens` are those of the summary at work. */
  onProgress?: (done: { done: number; total: number; tokens: number; record?: SummaryRecord }) => void
}

/**
 * What came of one article.
 *
 * @category Evaluation
 */
export interface SummaryRecord {
  /** Of the article. */
  source: string
  /** What the model wrote, without white space around it. */
  summary: string
  /** Tokens of the prompt. */
  promptTokens: number
  /** Tokens written. */
  tokens: number
  /** Whether the article was longer than `articleTokens`. */
  cut: boolean
  /** Whether the model ended the summary itself. */
  ended: boolean
  /** Against the whole reference. */
  rouge: RougeScores
}

/**
 * A figure over all articles.
 *
 * @category Evaluation
 */
export interface SummaryFigure {
  /** Mean over articles. */
  precision: number
  /** Mean over articles. */
  recall: number
  /** Mean over articles of the F-measure: the figure of the paper's table 6, there times 100. */
  fmeasure: number
  /** Of that mean; undefined for a single article. */
  standardError: number | undefined
  /** 95 % interval of that mean, 1.96 standard errors to each side; undefined for a single article. */
  interval: [number, number] | undefined
}

/**
 * What {@link summarize} gives.
 *
 * @category Evaluation
 */
export interface SummaryResult {
  /** How many there are. */
  articles: number
  /** Articles that were cut. */
  cut: number
  /** Summaries that the model ended itself. */
  ended: number
  /** Of words. */
  rouge1: SummaryFigure
  /** Of pairs of neighbouring words. */
  rouge2: SummaryFigure
  /** Of the longest common subsequence. */
  rougeL: SummaryFigure
  /** Of the same by lines. */
  rougeLsum: SummaryFigure
  /** One an article, in their order. */
  records: SummaryRecord[]
}

/** What {@link summarize} needs of a model. */
export type SummaryModel = Pick<Llama, 'contextWindow' | 'generate' | 'tokenizer'>

const HEAD = 'Read the following article and then summarize it.\n# '
const TAIL = '\nNow summarize the above article.\nSummary:'

/** Fields of GovReport's files. */
const FIELDS = { article: 'report', summary: 'summary' }

/**
 * How articles are read.
 *
 * @category Evaluation
 */
export interface ArticleOptions {
  /** Names of the fields; default GovReport's. */
  fields?: {
    /** Default `report`. */
    article?: string
    /** Default `summary`. */
    summary?: string
  }
  /** Ends the reading between two articles; it rejects with the signal's reason. */
  signal?: AbortSignal
}

/**
 * Reads articles and their summaries from .jsonl and .parquet files, or folders of them, in the order of `paths`. The fields
 * are GovReport's, `report` and `summary`, unless others are named.
 *
 * Throws RopewalkError: ERR_NO_TEXT where there is none, ERR_FIELD with file, line and field, ERR_FORMAT, ERR_NOT_FOUND
 * and the other codes of files; the reason of `signal` where that is aborted.
 *
 * @category Evaluation
 */
export async function readArticles(paths: readonly string[], options: ArticleOptions = {}): Promise<SummaryArticle[]> {
  const articles: SummaryArticle[] = []
  for await (const article of articlesOf(paths, options)) articles.push(article)
  return articles
}

async function* articlesOf(paths: readonly string[], options: ArticleOptions): AsyncGenerator<SummaryArticle> {
  const { article, summary } = { ...FIELDS, ...options.fields }
  let index = 0
  for (const path of await documentFiles(paths)) {
    for await (const row of readRows(path, [article, summary])) {
      options.signal?.throwIfAborted()
      const texts = { article: textField(row, article), summary: textField(row, summary) }
      yield { source: row.source, index: index++, ...texts }
    }
  }
  if (index === 0) {
    throw new RopewalkError('ERR_NO_TEXT', `${paths.join(', ')}: there is no article: give files with at least one`)
  }
}

/** The beginning of a text that is encoded as `limit` tokens, special ones not counted; the whole, if it has fewer. */
export function cutText(
  tokenizer: Pick<Tokenizer, 'decode' | 'encode'>,
  text: string,
  limit: number,
): { text: string; cut: boolean } {
  const encode = (part: string): number[] => tokenizer.encode(part, { addSpecialTokens: false })
  const ids = encode(text)
  if (ids.length <= limit) return { text, cut: false }
  const fits = (length: number): boolean => encode(text.slice(0, length)).length <= limit
  // Its first tokens say about how long it is; not exactly, since not every tokenizer gives texts back as they were.
  const near = tokenizer.decode(ids.slice(0, limit), { skipSpecialTokens: false }).length
  let [low, high] = [0, text.length]
  for (const guess of [near - 16, near + 16]) {
    if (guess <= low || guess >= high) continue
    if (fits(guess)) low = guess
    else high = guess
  }
  while (high - low > 1) {
    const middle = (low + high) >>> 1
    if (fits(middle)) low = middle
    else high = middle
  }
  // not between the halves of a character
  const code = text.charCodeAt(low - 1)
  return { text: text.slice(0, code >= 0xd800 && code < 0xdc00 ? low - 1 : low), cut: true }
}

/** The paper's prompt (2306.15595, section 3.5). */
export const summaryPrompt = (article: string): string => `${HEAD}${article}${TAIL}`

/**
 * Summarisation as in the paper (2306.15595, section 3.5): each article in the paper's prompt, cut to `articleTokens`; the
 * model's summary, sampled, against the reference by {@link rouge}. `model` is a {@link Llama} with a tokenizer. The same
 * seed gives the same summaries.
 *
 * Throws TypeError or RangeError for options out of range, also where prompt and summary could be longer than the model's
 * context window; RopewalkError ERR_NOT_FOUND or ERR_TOKENIZER where the model has no usable tokenizer.
 *
 * @category Evaluation
 */
export async function summarize(
  model: SummaryModel,
  articles: readonly SummaryArticle[],
  options: SummaryOptions = {},
): Promise<SummaryResult> {
  const { temperature = 0.5, topP = 0.95, topK = 0, seed = 0, stemmer = true, signal, onProgress } = options
  const { articleTokens, summaryTokens } = limitsOf(options)
  if (!Array.isArray(articles) || articles.length === 0) throw new TypeError('articles: the list is empty')
  if (!Number.isInteger(seed) || seed < 0) throw new RangeError(`seed is ${seed}, must be a whole number >= 0`)
  const tokenizer = await model.tokenizer()
  const frame = tokenizer.encode(summaryPrompt('')).length
  const needed = articleTokens + frame + summaryTokens
  if (needed > model.contextWindow) {
    throw new RangeError(
      `articleTokens ${articleTokens}, the prompt's ${frame} and summaryTokens ${summaryTokens} make ${needed}, but the ` +
        `model's context window is ${model.contextWindow}: use less of them, or a model that was stretched further`,
    )
  }
  const records: SummaryRecord[] = []
  for (const { source, index, article, summary: reference } of articles) {
    signal?.throwIfAborted()
    const { text, cut } = cutText(tokenizer, article, articleTokens)
    const prompt = tokenizer.encode(summaryPrompt(text))
    const sampling = { temperature, topP, topK, seed: seed + index, maxTokens: summaryTokens }
    let written = ''
    let tokens = 0
    for await (const token of model.generate({ prompt, ...sampling, ...(signal && { signal }) })) {
      written += token.text
      tokens++
      onProgress?.({ done: records.length, total: articles.length, tokens })
    }
    const room = Math.min(summaryTokens, model.contextWindow - prompt.length)
    const summary = written.trim()
    const figures = { promptTokens: prompt.length, tokens, cut, ended: tokens < room }
    const record = { source, summary, ...figures, rouge: rouge(reference, summary, { stemmer }) }
    records.push(record)
    onProgress?.({ done: records.length, total: articles.length, tokens, record })
  }
  const figures = Object.fromEntries(
    rougeTypes.map((type) => [type, figureOf(records.map(({ rouge }) => rouge[type]))]),
  )
  return {
    articles: records.length,
    cut: records.filter(({ cut }) => cut).length,
    ended: records.filter(({ ended }) => ended).length,
    ...(figures as Record<keyof RougeScores, SummaryFigure>),
    records,
  }
}

function limitsOf({ articleTokens = 15000, summaryTokens = 1000 }: SummaryLimits): Required<SummaryLimits> {
  for (const [name, value] of Object.entries({ articleTokens, summaryTokens })) {
    if (!Number.isInteger(value) || value < 1)
      throw new RangeError(`${name} is ${quote(value)}, must be a whole number >= 1`)
  }
  return { articleTokens, summaryTokens }
}

function figureOf(scores: readonly RougeScores[keyof RougeScores][]): SummaryFigure {
  const n = scores.length
  const mean = (values: readonly number[]): number => values.reduce((sum, value) => sum + value, 0) / n
  const precision = mean(scores.map((score) => score.precision))
  const recall = mean(scores.map((score) => score.recall))
  const fmeasure = mean(scores.map((score) => score.fmeasure))
  if (n < 2) return { precision, recall, fmeasure, standardError: undefined, interval: undefined }
  const squares = scores.reduce((sum, score) => sum + (score.fmeasure - fmeasure) ** 2, 0)
  const standardError = Math.sqrt(squares / (n - 1) / n)
  const interval: [number, number] = [fmeasure - 1.96 * standardError, fmeasure + 1.96 * standardError]
  return { precision, recall, fmeasure, standardError, interval }
}

/**
 * Writes what a model is fine-tuned on for {@link summarize}, from the same files: a .jsonl file with the fields `prompt`,
 * which is that of `summarize`, and `completion`, the summary behind a space, cut to `summaryTokens`. {@link TrainerOptions}
 * takes it as `data`, with `fields: { prompt: 'prompt', completion: 'completion' }`. Gives the number of examples. An
 * existing file is replaced, when the new one is complete.
 *
 * Throws what {@link readArticles} throws, RopewalkError ERR_NO_SPACE and ERR_WRITE, and RangeError for limits out of range.
 *
 * @category Evaluation
 */
export async function writeSummaryExamples(
  model: Pick<Llama, 'tokenizer'>,
  paths: readonly string[],
  out: string,
  options: SummaryLimits & ArticleOptions & { onProgress?: (done: { done: number }) => void } = {},
): Promise<number> {
  const { articleTokens, summaryTokens } = limitsOf(options)
  const tokenizer = await model.tokenizer()
  const temporary = temporaryName(out)
  let bytes = 0
  let done = 0
  try {
    const handle = await open(temporary, 'wx')
    try {
      for await (const { article, summary } of articlesOf(paths, options)) {
        const prompt = summaryPrompt(cutText(tokenizer, article, articleTokens).text)
        const completion = ` ${cutText(tokenizer, summary.trim(), summaryTokens).text}`
        const line = Buffer.from(`${JSON.stringify({ prompt, completion })}\n`)
        await writeAll(handle, line)
        bytes += line.length
        done++
        options.onProgress?.({ done })
      }
      await handle.sync()
    } finally {
      await handle.close()
    }
    await rename(temporary, out)
    return done
  } catch (error) {
    await rm(temporary, { force: true })
    throw await writeFailure(error, out, bytes)
  }
}
