import { quote, RopewalkError } from '../errors.js'
import type { Tokenizer } from '../files/tokenizer.js'
import type { Llama } from '../model/llama.js'
import { type ChoiceItem, splitTail } from './choice-items.js'

/**
 * Options of {@link multipleChoice}.
 *
 * @category Evaluation
 */
export interface ChoiceOptions {
  /** Tokens of one pass at most, padding included; a row alone may be longer. Default 2048. */
  batchTokens?: number
  /** The longest input in tokens; default: the model's context window. */
  maxLength?: number
  /** What is done with an item that is longer: 'truncate' (default) cuts its beginning off, 'refuse' throws. */
  tooLong?: 'truncate' | 'refuse'
  /** Ends the evaluation between two passes; it rejects with the signal's reason. */
  signal?: AbortSignal
  /** Called after each pass, with the items finished so far and their accuracy. */
  onProgress?: (done: { done: number; total: number; acc: number }) => void
}

/**
 * What came of one item.
 *
 * @category Evaluation
 */
export interface ChoiceRecord {
  /** Of the item. */
  source: string
  /** Index of the right choice. */
  gold: number
  /** Sum over a choice's tokens of their log-likelihood, in nats, for each choice. */
  logLikelihoods: number[]
  /** Tokens scored, for each choice. */
  tokens: number[]
  /** Tokens cut off the beginning, of the choice that lost most; 0 where all fitted. */
  truncated: number
  /** The choice with the largest log-likelihood; the first of equals. */
  choice: number
  /** The choice with the largest log-likelihood by its length in characters. */
  choiceNorm: number
  /** The choice with the largest log-likelihood by its length in bytes of UTF-8. */
  choiceBytes: number
}

/**
 * What {@link multipleChoice} gives. Standard errors are those of a mean of n values, with n - 1 in the variance, as in the
 * harness; undefined for a single item.
 *
 * @category Evaluation
 */
export interface ChoiceResult {
  /** How many there are. */
  items: number
  /** Share of items whose right choice has the largest log-likelihood: the harness's acc, and the figure of the paper. */
  acc: number
  /** Of acc. */
  accStandardError: number | undefined
  /** The same with log-likelihoods divided by the choices' lengths in characters: the harness's acc_norm. */
  accNorm: number
  /** Of accNorm. */
  accNormStandardError: number | undefined
  /** The same with log-likelihoods divided by the choices' lengths in bytes of UTF-8: the harness's acc_bytes. */
  accBytes: number
  /** Of accBytes. */
  accBytesStandardError: number | undefined
  /** Items of which something was cut off. */
  truncated: number
  /** One an item, in their order. */
  records: ChoiceRecord[]
}

/** What {@link multipleChoice} needs of a model. */
export type ChoiceModel = Pick<Llama, 'config' | 'contextWindow' | 'tokenLosses' | 'tokenizer'>

/** Tokens of one choice behind its context, the last `scored` of which count. */
interface Request {
  item: number
  choice: number
  ids: number[]
  scored: number
}

/** Lengths of passes are rounded up to it, so that few different ones are recorded. */
const STEP = 16

/**
 * Zero-shot multiple choice as EleutherAI's lm-evaluation-harness scores it: a choice's log-likelihood is the sum over its
 * tokens behind the context. Context and choice are encoded together, spaces at the context's end being part of the choice;
 * what is longer than `maxLength` + 1 tokens loses its beginning. Items come from {@link readChoiceItems}; `model` is a
 * {@link Llama} with a tokenizer. How choices share passes changes nothing but rounding.
 *
 * Throws TypeError or RangeError for options and items out of range, and for what is too long where `tooLong` is 'refuse';
 * RopewalkError ERR_NOT_FOUND or ERR_TOKENIZER where the model has no usable tokenizer, ERR_NOT_FINITE for a
 * log-likelihood that is NaN.
 *
 * @category Evaluation
 */
export async function multipleChoice(
  model: ChoiceModel,
  items: readonly ChoiceItem[],
  options: ChoiceOptions = {},
): Promise<ChoiceResult> {
  const { batchTokens = 2048, maxLength = model.contextWindow, tooLong = 'truncate', signal, onProgress } = options
  for (const [name, value] of Object.entries({ batchTokens, maxLength })) {
    if (!Number.isInteger(value) || value < 1) throw new RangeError(`${name} is ${value}, must be a whole number >= 1`)
  }
  if (tooLong !== 'truncate' && tooLong !== 'refuse')
    throw new RangeError(`tooLong is ${quote(tooLong)}, but must be 'truncate' or 'refuse'`)
  if (!Array.isArray(items) || items.length === 0) throw new TypeError('items: the list is empty')
  const tokenizer = await model.tokenizer()
  const records: ChoiceRecord[] = []
  const requests: Request[] = []
  for (const [index, item] of items.entries()) {
    checkItem(item, index)
    const record = { source: item.source, gold: item.gold, logLikelihoods: [], tokens: [], truncated: 0 }
    records.push({ ...record, choice: 0, choiceNorm: 0, choiceBytes: 0 })
    for (const choice of item.requests.keys()) {
      const request = { item: index, choice, ...encodeChoice(tokenizer, item, choice) }
      const cut = request.ids.length - (maxLength + 1)
      if (request.scored > maxLength || (cut > 0 && tooLong === 'refuse')) {
        throw new RangeError(
          `${item.source}: choice ${choice} has ${request.ids.length} tokens, ${request.scored} of them scored, but ` +
            `maxLength is ${maxLength}: ${request.scored > maxLength ? 'nothing could be cut off' : "tooLong 'truncate' would cut its beginning off"}`,
        )
      }
      if (cut > 0) request.ids = request.ids.slice(cut)
      records[index]!.truncated = Math.max(records[index]!.truncated, cut)
      records[index]!.tokens.push(request.scored)
      requests.push(request)
    }
  }

  const left = items.map(({ requests }) => requests.length)
  let done = 0
  let right = 0
  for (const batch of batches(requests, batchTokens, dependsOnLength(model))) {
    signal?.throwIfAborted()
    const sums = await logLikelihoods(model, batch)
    for (const [row, { item, choice }] of batch.entries()) {
      const record = records[item]!
      if (Number.isNaN(sums[row])) {
        throw new RopewalkError('ERR_NOT_FINITE', `${record.source}: choice ${choice} has no log-likelihood (NaN)`)
      }
      record.logLikelihoods[choice] = sums[row]!
      if (--left[item]! > 0) continue
      decide(record, items[item]!)
      done++
      if (record.choice === record.gold) right++
    }
    onProgress?.({ done, total: items.length, acc: done > 0 ? right / done : 0 })
  }
  const acc = proportion(records.map(({ gold, choice }) => gold === choice))
  const norm = proportion(records.map(({ gold, choiceNorm }) => gold === choiceNorm))
  const bytes = proportion(records.map(({ gold, choiceBytes }) => gold === choiceBytes))
  return {
    items: items.length,
    acc: acc.mean,
    accStandardError: acc.standardError,
    accNorm: norm.mean,
    accNormStandardError: norm.standardError,
    accBytes: bytes.mean,
    accBytesStandardError: bytes.standardError,
    truncated: records.filter(({ truncated }) => truncated > 0).length,
    records,
  }
}

function checkItem({ source, requests, choices, gold }: ChoiceItem, index: number): void {
  if (!Array.isArray(requests) || requests.length < 2 || choices?.length !== requests.length)
    throw new TypeError(`items[${index}] (${source}): two requests or more are expected, and a choice for each`)
  if (!Number.isInteger(gold) || gold < 0 || gold >= requests.length)
    throw new RangeError(
      `items[${index}] (${source}): gold is ${gold}, but must be an index of its ${requests.length} choices`,
    )
}

/** Token ids of a context and a continuation, and how many of the last are scored (the harness's _encode_pair). */
export function encodeChoice(
  tokenizer: Pick<Tokenizer, 'bosId' | 'eosId' | 'decode' | 'encode'>,
  { source, requests }: Pick<ChoiceItem, 'source' | 'requests'>,
  choice: number,
): { ids: number[]; scored: number } {
  const { context, continuation } = requests[choice]!
  const prefix = tokenizer.bosId ?? tokenizer.eosId
  let ids: number[]
  let known: number
  if (context === '') {
    ids = tokenizer.encode(continuation, { addSpecialTokens: false })
    if (prefix !== undefined && ids[0] !== prefix) ids.unshift(prefix)
    known = 1
  } else {
    // A text that begins with the beginning-of-sequence token in writing gets no second one.
    const written = prefix === undefined ? '' : tokenizer.decode([prefix], { skipSpecialTokens: false })
    const addSpecialTokens = written === '' || !context.startsWith(written)
    const [head, tail] = splitTail(context)
    ids = tokenizer.encode(head + tail + continuation, { addSpecialTokens })
    known = tokenizer.encode(head, { addSpecialTokens }).length
  }
  const scored = ids.length - known
  if (known < 1 || scored < 1) {
    throw new RangeError(
      `${source}: choice ${choice} leaves ${known} tokens to read and ${scored} to score: both need one`,
    )
  }
  return { ids, scored }
}

/** Where frequencies follow from the length of the longest text, only texts of one length share a pass. */
const dependsOnLength = ({ config }: ChoiceModel): boolean => ['dynamic', 'longrope'].includes(config.rope.type)

/** Inputs of a request: its last token is predicted, not read. */
const inputsOf = ({ ids }: Request): number => ids.length - 1

/** Requests in groups for one pass each, the longest first; choices of one item stay together where they are as long. */
function* batches(requests: readonly Request[], tokens: number, sameLength: boolean): Generator<Request[]> {
  const order = [...requests].sort((a, b) => inputsOf(b) - inputsOf(a) || a.item - b.item || a.choice - b.choice)
  let batch: Request[] = []
  for (const request of order) {
    const longest = batch[0] ?? request
    const full = (batch.length + 1) * timeOf([longest]) > tokens
    if (batch.length > 0 && (full || (sameLength && inputsOf(longest) !== inputsOf(request)))) {
      yield batch
      batch = []
    }
    batch.push(request)
  }
  yield batch
}

const timeOf = (batch: readonly Request[]): number => Math.ceil(batch[0]!.ids.length / STEP) * STEP

/** The sum of each row's scored log-likelihoods. Rows are filled up at their end, where nothing sees them. */
async function logLikelihoods(model: ChoiceModel, batch: readonly Request[]): Promise<number[]> {
  const time = timeOf(batch)
  const size = batch.length * time
  const dims = [batch.length, time]
  const [tokens, positions, labels] = [new Int32Array(size), new Int32Array(size), new Int32Array(size).fill(-100)]
  batch.forEach(({ ids, scored }, row) => {
    const at = row * time
    tokens.set(ids, at)
    labels.set(ids.slice(-scored), at + ids.length - scored)
    // What is only predicted or filled up stays at position 0: it makes no text longer than it is.
    for (let t = 0; t < ids.length - 1; t++) positions[at + t] = t
  })
  const like = (data: Int32Array) => ({ dims, data })
  const { data } = await model.tokenLosses(like(tokens), { labels: like(labels), positions: like(positions) })
  return batch.map((_, row) => {
    let sum = 0
    for (let t = row * time; t < (row + 1) * time; t++) sum -= data[t]!
    return sum
  })
}

const encoder = new TextEncoder()

/** Fills in which choices a record's log-likelihoods are for. */
function decide(record: ChoiceRecord, { choices }: ChoiceItem): void {
  const { logLikelihoods } = record
  const best = (scores: readonly number[]): number => scores.indexOf(Math.max(...scores))
  const by = (lengthOf: (text: string) => number): number =>
    best(logLikelihoods.map((sum, i) => sum / Math.max(lengthOf(choices[i]!), 1)))
  record.choice = best(logLikelihoods)
  record.choiceNorm = by((text) => [...text].length)
  record.choiceBytes = by((text) => encoder.encode(text).length)
}

function proportion(hits: readonly boolean[]): { mean: number; standardError: number | undefined } {
  const n = hits.length
  const mean = hits.filter(Boolean).length / n
  return { mean, standardError: n > 1 ? Math.sqrt((mean * (1 - mean)) / (n - 1)) : undefined }
}
