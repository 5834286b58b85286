import { createHash } from 'node:crypto'
import { readdir, stat } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { Tokenizer as LibraryTokenizer } from '@huggingface/tokenizers'
import { didYouMean, quote, RopewalkError } from '../errors.js'
import { bpeEncoder } from './bpe.js'
import { readSmallFile } from './bytes.js'
import { containedFile, realFolder } from './folder.js'
import { isObject, type JsonObject, type JsonValue, parseJson, readJsonObject } from './json.js'

/**
 * A tokenizer.json, ready for use; {@link Llama.tokenizer} gives it. Ids are those of the Rust tokenizers library.
 *
 * @category Models
 */
export type Tokenizer = {
  /** Number of tokens, added ones included. */
  vocabSize: number
  /** The largest id that encode can give: the embedding needs at least maxId + 1 rows. */
  maxId: number
  /**
   * Token ids of a text; special tokens written in the text are recognised, as in transformers. `addSpecialTokens`
   * (default true) adds those that the tokenizer puts around a text. Throws TypeError for what is no string.
   */
  encode(text: string, options?: { addSpecialTokens?: boolean }): number[]
  /**
   * The text of token ids; ids without a token are left out. `skipSpecialTokens` is true by default. Throws RangeError
   * for what is no token id.
   */
  decode(ids: Iterable<number>, options?: { skipSpecialTokens?: boolean }): string
  /** Beginning of a sequence, where tokenizer_config.json or config.json names one. */
  bosId?: number
  /** End of a sequence, where one of them names it. */
  eosId?: number
  /** SHA-256 of tokenizer.json, hexadecimal. */
  hash: string
}

const fileName = 'tokenizer.json'
const maxTokenizerBytes = 256 << 20
const maxConfigBytes = 16 << 20

/**
 * Loads tokenizer.json from a model folder or by its path. Ids and texts are those of the Rust tokenizers library; the
 * "clean up" of spaces that some tokenizer_config.json asks of decoding is left out, since it changes the text.
 * Throws RopewalkError ERR_NOT_FOUND, ERR_TOKENIZER, ERR_JSON.
 */
export async function loadTokenizer(dirOrFile: string): Promise<Tokenizer> {
  const isFile = (await stat(dirOrFile).catch(() => undefined))?.isFile() ?? false
  const dir = isFile ? dirname(dirOrFile) : dirOrFile
  const root = await realFolder(dir)
  const names = new Set(await readdir(root))
  const name = isFile ? basename(dirOrFile) : fileName
  const path = join(dir, name)
  if (!names.has(name)) throw missing(dir, names)
  const bytes = await readSmallFile(await containedFile(root, name, path), maxTokenizerBytes, path)
  const json = parseJson(bytes, path)
  if (!isObject(json) || !isObject(json.model)) {
    throw new RopewalkError('ERR_TOKENIZER', `${path}: no "model" object: a Hugging Face tokenizer.json is expected`)
  }
  refuseSlowPatterns(json, path)
  const readOptional = async (name: string): Promise<JsonObject> => {
    if (!names.has(name)) return {}
    const shownPath = join(dir, name)
    const real = await containedFile(root, name, shownPath)
    return readJsonObject(real, { python: true, maxBytes: maxConfigBytes, shownPath })
  }
  const settings = await readOptional('tokenizer_config.json')
  const config = await readOptional('config.json')
  const library = build(json, settings, path)
  // ids without a token are holes in the library's list
  const ids = [...library.get_vocab()].flatMap(([token, id]) => (token === undefined ? [] : [id]))
  const special = new Set([...library.get_added_tokens_decoder().values()].filter((t) => t.special).map((t) => t.id))
  const idOf = (token: JsonValue | undefined, fallback: JsonValue | undefined): number | undefined => {
    const content = isObject(token) ? token.content : token
    const id = typeof content === 'string' ? library.token_to_id(content) : undefined
    const first = Array.isArray(fallback) ? fallback[0] : fallback
    return id ?? (typeof first === 'number' ? first : undefined)
  }
  return {
    vocabSize: ids.length,
    maxId: ids.reduce((a, b) => Math.max(a, b), -1),
    bosId: idOf(settings.bos_token, config.bos_token_id),
    eosId: idOf(settings.eos_token, config.eos_token_id),
    hash: createHash('sha256').update(bytes).digest('hex'),
    encode(text, { addSpecialTokens = true } = {}) {
      if (typeof text !== 'string') throw new TypeError(`text: ${quote(text)}, but a string is expected`)
      return library.encode(text, { add_special_tokens: addSpecialTokens }).ids
    },
    decode(ids, { skipSpecialTokens = true } = {}) {
      const kept: number[] = []
      for (const id of ids) {
        if (!Number.isInteger(id) || id < 0) throw new RangeError(`ids: ${quote(id)} is not a token id`)
        if (library.id_to_token(id) === undefined || (skipSpecialTokens && special.has(id))) continue
        kept.push(id)
      }
      if (kept.length === 0) return ''
      return library.decode(kept, { skip_special_tokens: false, clean_up_tokenization_spaces: false })
    },
  }
}

function missing(dir: string, names: Set<string>): RopewalkError {
  const remedy = names.has('tokenizer.model')
    ? 'there is a tokenizer.model (SentencePiece): convert it once, in Python, with ' +
      'AutoTokenizer.from_pretrained(folder).save_pretrained(folder)'
    : `download it with the model${didYouMean(fileName, names)}`
  return new RopewalkError('ERR_NOT_FOUND', `${dir}: no ${fileName}: ${remedy}`)
}

function build(json: JsonObject, settings: JsonObject, path: string): LibraryTokenizer {
  const parts = {
    normalizer: null,
    pre_tokenizer: null,
    post_processor: null,
    decoder: null,
    added_tokens: [],
    ...json,
  }
  const eos = isObject(settings.eos_token) ? settings.eos_token.content : settings.eos_token
  try {
    // of tokenizer_config.json only this one: the rest would change texts in ways tokenizer.json does not say
    const library = new LibraryTokenizer(parts, { eos_token: eos })
    useOwnBpe(library, json.model as JsonObject)
    return library
  } catch (cause) {
    if (cause instanceof RopewalkError) throw cause
    throw new RopewalkError('ERR_TOKENIZER', `${path}: ${(cause as Error).message}: download it again`, { cause })
  }
}

/** Puts our merge in the place of the library's; a model with suffixes or dropout (no LLaMA has them) keeps the old. */
function useOwnBpe(library: LibraryTokenizer, model: JsonObject): void {
  const { vocab, merges } = model
  if (!isObject(vocab) || !Array.isArray(merges) || library.model === null) return
  if (model.continuing_subword_prefix || model.end_of_word_suffix || model.dropout) return
  const pairs = merges.map((merge, rank): [string, string] => {
    const pair = typeof merge === 'string' ? merge.split(' ') : merge
    if (!Array.isArray(pair) || pair.length !== 2 || !pair.every((token) => typeof token === 'string')) {
      throw new RangeError(`merge ${rank}: ${quote(merge)} is not a pair of tokens`)
    }
    return pair as [string, string]
  })
  const ids = new Map<string, number>()
  for (const [token, id] of Object.entries(vocab)) {
    if (typeof id !== 'number' || !Number.isInteger(id) || id < 0 || id >= 2 ** 31 - 1) {
      throw new RangeError(`vocabulary: the id of ${quote(token)} is ${quote(id)}, not a whole number`)
    }
    ids.set(token, id)
  }
  const encode = bpeEncoder({
    vocab: ids,
    merges: pairs,
    unkToken: typeof model.unk_token === 'string' ? model.unk_token : null,
    fuseUnk: model.fuse_unk === true,
    byteFallback: model.byte_fallback === true,
    ignoreMerges: model.ignore_merges === true,
  })
  const tokens: string[] = []
  for (const [token, id] of ids) tokens[id] = token
  // the library's own fusing runs over all words; the Rust library fuses inside one, as ours does
  library.model.fuse_unk = false
  library.model.encode = (words: string[]) => words.flatMap((word) => encode(word).map((id) => tokens[id]))
}

/**
 * A pattern with a repeated group that itself repeats, such as (a+)+, takes exponential time on a text made for it. The
 * patterns of LLaMA, GPT and Mistral tokenizers have none.
 */
function refuseSlowPatterns(node: JsonValue, path: string): void {
  if (typeof node !== 'object' || node === null) return
  if (Array.isArray(node)) {
    for (const item of node) refuseSlowPatterns(item, path)
    return
  }
  for (const [key, value] of Object.entries(node)) {
    if (key === 'vocab' || key === 'merges') continue
    if (key === 'Regex' && typeof value === 'string' && repeatsARepeat(value)) {
      throw new RopewalkError(
        'ERR_TOKENIZER',
        `${path}: the pattern ${quote(value)} repeats a group that repeats inside: a text can be made that takes for ever`,
      )
    }
    refuseSlowPatterns(value, path)
  }
}

export function repeatsARepeat(pattern: string): boolean {
  // one entry a level of groups: does it repeat something without limit?
  const open = [false]
  let closed = false
  const tokens = pattern.matchAll(/\\.|\[(?:\\.|[^\]\\])*\]|\((?:\?[a-z:=!<-]*)?|\)|[*+]|\{\d+,\}|./gsu)
  for (const [token] of tokens) {
    if (token.startsWith('(')) open.push(false)
    else if (token === ')' && open.length > 1) {
      closed = open.pop() as boolean
      if (closed) open[open.length - 1] = true
      continue
    } else if (token === '*' || token === '+' || /^\{\d+,\}$/.test(token)) {
      if (closed) return true
      open[open.length - 1] = true
    }
    closed = false
  }
  return false
}
