import { Dice, PIECE, prose, refrain } from '../../demo/data.js'
import { passkeyPrompt } from '../../eval/passkey.js'
import type { Tokenizer } from '../../files/tokenizer.js'

/** Tokens of the shortest document that is written for itself. */
const LEAST = 16

/**
 * The miniature's texts, from the demo's generator, as documents for the trainer and the evaluations to read. Pieces (a
 * word with the space before it) are never joined by the tokenizer, so a text's length in tokens is known while it is
 * made, and a document ends where it is to end.
 */
export class Writer {
  private readonly lengths = new Map<string, number>()

  constructor(private readonly tokenizer: Pick<Tokenizer, 'encode'>) {}

  /** Tokens of a piece. */
  private length(piece: string): number {
    let length = this.lengths.get(piece)
    if (length === undefined) {
      this.lengths.set(piece, (length = this.tokenizer.encode(piece, { addSpecialTokens: false }).length))
    }
    return length
  }

  /** Tokens of a text made of whole pieces, its BOS included. */
  tokens(text: string): number {
    return [...text.matchAll(PIECE)].reduce((sum, [piece]) => sum + this.length(piece), 1)
  }

  /** A document of exactly `tokens` tokens, its BOS included, from the beginning of an endless text. */
  take(pieces: Iterable<string>, tokens: number): string {
    let text = ''
    let room = tokens - 1
    for (const piece of pieces) {
      if (this.length(piece) > room) break
      text += piece
      room -= this.length(piece)
    }
    // What is left is less than a word: digits are a token each.
    return text + '0'.repeat(room)
  }

  prose(dice: Dice, people: number, tokens: number): string {
    return this.take(prose(dice, people), tokens)
  }

  refrain(dice: Dice, words: number, tokens: number): string {
    return this.take(refrain(dice, words), tokens)
  }

  /** The paper's prompt with its answer, and as much filler as `tokens` can hold; at random places. */
  passkey(dice: Dice, tokens: number): string {
    const key = String(10000 + dice.below(90000))
    const of = (before: number, after: number): string => `${passkeyPrompt(key, before, after)} ${key}`
    const bare = this.bare
    const total = Math.max(0, Math.floor((tokens - bare) / this.unit))
    const after = Math.floor(dice.next() * (total + 1))
    return of(total - after, after)
  }

  private cost: { bare: number; unit: number } | undefined

  private get costs(): { bare: number; unit: number } {
    const of = (before: number): number => this.tokens(`${passkeyPrompt('12345', before, 0)} 12345`)
    // Two to spare: the first filler of a line begins with a piece of its own.
    return (this.cost ??= { bare: of(0) + 2, unit: of(2) - of(1) })
  }

  /** Tokens of a passkey document without filler. */
  get bare(): number {
    return this.costs.bare
  }

  private get unit(): number {
    return this.costs.unit
  }

  /**
   * Documents that together have exactly `tokens` tokens: a window of the demo's mixture. 45 % hold passkey documents of
   * all lengths, 45 % a refrain, the others prose.
   */
  window(dice: Dice, tokens: number): string[] {
    const kind = dice.next()
    const people = 3 + dice.below(8)
    if (kind >= 0.9) return [this.prose(dice, people, tokens)]
    if (kind >= 0.45) return [this.refrain(dice, 4 + dice.below(Math.min(36, tokens / 4)), tokens)]
    const documents: string[] = []
    let room = tokens
    while (room >= this.bare) {
      const text = this.passkey(dice, this.bare + Math.floor(dice.next() ** 2 * (room - this.bare + 1)))
      documents.push(text)
      room -= this.tokens(text)
    }
    // Too little for a document is added to the last one, behind the answer.
    if (room >= LEAST) documents.push(this.prose(dice, people, room))
    else if (room > 0) documents.push(`${documents.pop()!}.${'0'.repeat(room - 1)}`)
    return documents
  }
}
