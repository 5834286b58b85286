import t from 'tap'
import { Device } from '../../lib/runtime/device.js'
import * as emitters from '../../lib/runtime/ops.gen.js'
import { Recorder } from '../../lib/runtime/recorder.js'
import type { DType } from '../../lib/runtime/tensor.js'

const { attentionBwd, attentionCached, attentionFwd, embeddingBwd, linearCrossEntropyFwd } = emitters
const { matmulNt, matmulSwiglu, rmsnormFwd } = emitters

/** Records an op of a device that allocates nothing. */
function on(device: Device) {
  const recorder = new Recorder(device, 'test')
  const of = (dtype: DType, ...dims: number[]) => device.tensor(dtype, dims, dtype)
  const attention = (dtype: DType, B: number, T: number, H: number, K: number, D: number) => {
    const [q, k] = [of(dtype, B, T, H, D), of(dtype, B, T, K, D)]
    const table = of('f32', 4, D / 2)
    return { q, k, v: k, cos: table, sin: table, pos: of('i32', B, T), first: of('i32', B, T), scale: 1 }
  }
  return {
    attention: (...shape: Parameters<typeof attention>) => attentionFwd(recorder, attention(...shape)),
    gradients: (...shape: Parameters<typeof attention>) => {
      const args = attention(...shape)
      const [, B, T, H] = shape
      const [lse, delta] = [of('f32', B, H, T), of('f32', B, H, T)]
      return attentionBwd(recorder, { ...args, lse, delta, dout: args.q, groups: 1 })
    },
    cached: (...shape: Parameters<typeof attention>) => {
      const { k, v, pos, ...args } = attention(...shape)
      return attentionCached(recorder, { ...args, k_cache: k, v_cache: v, pos, last: pos })
    },
    product: (M: number, N: number, K: number) => matmulNt(recorder, { a: of('bf16', M, K), b: of('bf16', N, K) }),
    gated: (M: number, N: number, K: number) =>
      matmulSwiglu(recorder, { a: of('bf16', M, K), w_gate: of('bf16', N, K), w_up: of('bf16', N, K) }),
    norm: (N: number, C: number) => rmsnormFwd(recorder, { x: of('bf16', N, C), w: of('bf16', C), eps: 1e-5 }),
    scatter: (N: number, V: number, C: number) => {
      const dw = of('f32', V, C)
      return embeddingBwd(recorder, { ids: of('i32', N), dy: of('bf16', N, C), add: dw, dw })
    },
    loss: (N: number, V: number, C: number) =>
      linearCrossEntropyFwd(recorder, { x: of('bf16', N, C), w: of('bf16', V, C), labels: of('i32', N), chunk: 1 }),
  }
}

t.test('sizes beyond the CUDA kernels are errors at record time, the largest ones are not', async (t) => {
  const gpu = on(Device.open('dry:cuda'))
  const cpu = on(Device.open('dry'))
  const million = 1 << 20
  type Ops = typeof gpu
  const cases: [fits: (on: Ops) => unknown, larger: (on: Ops) => unknown, message: string][] = [
    [
      ({ attention }) => attention('bf16', 1, 8, 2, 1, 256),
      ({ attention }) => attention('bf16', 1, 8, 2, 1, 258),
      'attention_fwd: D is 258, but a GPU\'s kernels take at most 256; device "cpu" takes more',
    ],
    [
      ({ attention }) => attention('bf16', 1, million, 32, 8, 128),
      ({ attention }) => attention('bf16', 1, 3 * million, 32, 8, 128),
      'attention_fwd: T H / K is 12582912, but a GPU\'s kernels take at most 8388480; device "cpu" takes more',
    ],
    [
      ({ attention }) => attention('f32', 1, million / 2, 32, 8, 128),
      ({ attention }) => attention('f32', 1, million, 32, 8, 128),
      'attention_fwd: T H / K is 4194304, but a GPU\'s kernels take at most 4194240; device "cpu" takes more',
    ],
    [
      ({ cached }) => cached('bf16', 1, 8, 2, 1, 256),
      ({ cached }) => cached('bf16', 1, 8, 2, 1, 512),
      'attention_cached: D is 512, but a GPU\'s kernels take at most 256; device "cpu" takes more',
    ],
    [
      ({ gradients }) => gradients('bf16', 65535, 1, 1, 1, 2),
      ({ gradients }) => gradients('bf16', 65536, 1, 1, 1, 2),
      'attention_bwd: B is 65536, but a GPU\'s kernels take at most 65535; device "cpu" takes more',
    ],
    [
      ({ gradients }) => gradients('bf16', 1, million, 2, 1, 128),
      ({ gradients }) => gradients('bf16', 1, 2 * million, 2, 1, 128),
      'attention_bwd: T is 2097152, but a GPU\'s kernels take at most 2097120; device "cpu" takes more',
    ],
    [
      ({ product }) => product(2 ** 31 - 1025, 1, 1),
      ({ product }) => product(2 ** 31 - 1024, 1, 1),
      'matmul_nt: M is 2147482624, but a GPU\'s kernels take at most 2147482623; device "cpu" takes more',
    ],
    [
      ({ gated }) => gated(1, 1, 2 ** 31 - 1025),
      ({ gated }) => gated(1, 1, 2 ** 31),
      'matmul_swiglu: K is 2147483648, but a GPU\'s kernels take at most 2147482623; device "cpu" takes more',
    ],
    [
      ({ norm }) => norm(1, 2 ** 30),
      ({ norm }) => norm(1, 2 ** 30 + 1),
      'rmsnorm_fwd: C is 1073741825, but a GPU\'s kernels take at most 1073741824; device "cpu" takes more',
    ],
    [
      ({ scatter }) => scatter(1, 1, 65535 * 128),
      ({ scatter }) => scatter(1, 1, 65536 * 128),
      'embedding_bwd: C is 8388608, but a GPU\'s kernels take at most 8388480; device "cpu" takes more',
    ],
    [
      ({ loss }) => loss(1, 2 ** 31 - 1025, 1),
      ({ loss }) => loss(1, 2 ** 31, 1),
      'linear_cross_entropy_fwd: V is 2147483648, but a GPU\'s kernels take at most 2147482623; device "cpu" takes more',
    ],
  ]
  for (const [fits, larger, message] of cases) {
    t.doesNotThrow(() => fits(gpu), message)
    t.throws(() => larger(gpu), new RangeError(message))
    t.doesNotThrow(() => larger(cpu), 'the CPU has no such limit')
  }
})
