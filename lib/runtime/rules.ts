// What the op table cannot say of an operation's arguments; checked at record time, like the table.
import { isQuantized, type Tensor } from './tensor.js'

type Args = { readonly [name: string]: Tensor | number | undefined }

/** How the weights of an update are kept, and the numbers that key its rounding (csrc/adamw.h). */
function adamw(op: string, args: Args): void {
  const { p, master, low } = args as { [name: string]: Tensor | undefined }
  if (master && low) {
    throw new TypeError(`${op}: both master and low are given, two ways to keep p in f32: leave one of them out`)
  }
  for (const [name, tensor] of Object.entries({ master, low })) {
    if (tensor && p!.dtype === 'f32') {
      throw new TypeError(`${op}: ${name} is given, but p (${p!.describe()}) is f32 itself: leave ${name} out`)
    }
  }
  for (const name of ['seed', 'first']) {
    const value = args[name]
    if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < 0) {
      throw new RangeError(`${op}: ${name} is ${String(value)}, but must be a whole number from 0 to 2^53 - 1`)
    }
  }
}

/** One of the two is quantised, not just narrow: for that there is cast. */
const quantized =
  (name: 'x' | 'y') =>
  (op: string, args: Args): void => {
    const tensor = args[name] as Tensor | undefined
    if (!tensor) throw new TypeError(`${op}: ${name} is missing: a tensor of dtype nf4 or int8`)
    if (isQuantized(tensor.dtype)) return
    throw new TypeError(`${op}: ${name} (${tensor.describe()}) must be nf4 or int8; cast is for f32 and bf16`)
  }

const RULES: Readonly<Record<string, (op: string, args: Args) => void>> = {
  adamw,
  adamw_8bit: adamw,
  quantize: quantized('y'),
  dequantize: quantized('x'),
}

/** Throws where the arguments break the rule of their op. */
export function checkRule(op: string, args: Args): void {
  RULES[op]?.(op, args)
}
