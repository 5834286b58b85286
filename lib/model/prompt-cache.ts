import type { Device } from '../runtime/device.js'
import type { LlamaConfig } from './config.js'
import { Continuation } from './generate.js'
import type { Parameters } from './parameters.js'

/**
 * Keeps the keys and values of a text between calls of {@link Llama.generate}: a prompt that begins as the one before did
 * costs only what comes after. Nothing else changes, not a bit. It is for one model, whose weights must not change
 * meanwhile, and for one call at a time. `dispose()` or `using` frees its memory, as disposing the model does.
 *
 * @category Models
 */
export class PromptCache {
  private text: Continuation | undefined
  private busy = false

  /** With room for `tokens` tokens from the start; it grows, and begins anew, where a text needs more. */
  constructor(private readonly tokens = 0) {}

  /** @internal The text to continue, until `release`. */
  take(device: Device, config: LlamaConfig, parameters: Parameters, capacity: number): Continuation {
    if (this.busy) throw new Error('this cache is in use by another call: give each call at work one of its own')
    if (!this.text?.serves(parameters, capacity)) {
      this.dispose()
      this.text = new Continuation(device, config, parameters, Math.max(capacity, this.tokens))
    }
    this.busy = true
    return this.text
  }

  /** @internal */
  release(): void {
    this.busy = false
  }

  /** Frees its memory; the next call begins anew. Throws while a call is still at work. */
  dispose(): void {
    if (this.busy) throw new Error('this cache is in use: let the call end before it is disposed')
    this.text?.dispose()
    this.text = undefined
  }

  /** The same as `dispose`, for `using`. */
  [Symbol.dispose](): void {
    this.dispose()
  }
}
