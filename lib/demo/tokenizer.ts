import { PIECE } from './data.js'

/** Names of the tokens that begin and end a text. */
export const BEGIN = '<|begin_of_text|>'
export const END = '<|end_of_text|>'

/** GPT-2's printable stand-in for each byte. */
function byteCharacters(): string[] {
  const printable = (byte: number): boolean =>
    (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || (byte >= 0xae && byte <= 0xff)
  let next = 256
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(printable(byte) ? byte : next++))
}

/**
 * Learns byte-pair merges from a text and gives the tokenizer.json, as Hugging Face's libraries read it: 256 bytes, then
 * a token a merge, then BEGIN and END, `size` in all. Always the most frequent pair is merged, the first of equals.
 */
export function trainTokenizer(text: string, size: number): Record<string, unknown> {
  const characters = byteCharacters()
  const counts = new Map<string, number>()
  for (const [piece] of text.matchAll(PIECE)) counts.set(piece, (counts.get(piece) ?? 0) + 1)
  const pieces = [...counts].map(([piece, count]) => ({
    count,
    symbols: Array.from(Buffer.from(piece, 'utf8'), (byte) => characters[byte]!),
  }))
  const merges: string[] = []
  const vocab = [...characters]
  while (vocab.length < size - 2) {
    const pairs = new Map<string, number>()
    for (const { symbols, count } of pieces) {
      for (let i = 1; i < symbols.length; i++) {
        const pair = `${symbols[i - 1]} ${symbols[i]}`
        pairs.set(pair, (pairs.get(pair) ?? 0) + count)
      }
    }
    let best: string | undefined
    for (const [pair, count] of pairs) if (best === undefined || count > pairs.get(best)!) best = pair
    if (best === undefined) throw new RangeError(`the text has only ${vocab.length} tokens to learn, not ${size - 2}`)
    const [left, right] = best.split(' ') as [string, string]
    for (const { symbols } of pieces) {
      for (let i = 1; i < symbols.length; i++) {
        if (symbols[i - 1] === left && symbols[i] === right) symbols.splice(i - 1, 2, left + right)
      }
    }
    merges.push(best)
    vocab.push(left + right)
  }
  const special = [BEGIN, END].map((content, i) => ({
    ...{
      id: size - 2 + i,
      content,
      single_word: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
      special: true,
    },
  }))
  const template = [{ SpecialToken: { id: BEGIN, type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }]
  return {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: special,
    normalizer: null,
    pre_tokenizer: {
      type: 'Sequence',
      pretokenizers: [
        { type: 'Split', pattern: { Regex: PIECE.source }, behavior: 'Isolated', invert: false },
        { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: false },
      ],
    },
    post_processor: {
      type: 'TemplateProcessing',
      single: template,
      pair: [...template, { Sequence: { id: 'B', type_id: 1 } }],
      special_tokens: { [BEGIN]: { id: BEGIN, ids: [size - 2], tokens: [BEGIN] } },
    },
    decoder: { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: false },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      vocab: Object.fromEntries(vocab.map((token, id) => [token, id])),
      merges,
    },
  }
}
