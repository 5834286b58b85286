import { readFileSync } from 'node:fs'
import t from 'tap'
import {
  extendRope,
  inverseFrequencies,
  ntkTheta,
  readRope,
  rotationTable,
  type RopeConfig,
  type RopeExtension,
  writeRope,
} from '../lib/rope.js'
import { caseNames } from './golden.js'

const fixtures = new URL('./fixtures/', import.meta.url)
const json = (name: string) => JSON.parse(readFileSync(new URL(name, fixtures), 'utf8'))

type Case = { name: string; invFreq: ArrayLike<number>; expected: number[] }

/** Compares with the reference's float32 values; returns how many agree to the bit. */
function compare(t: TapTest, { name, invFreq, expected }: Case): number {
  t.equal(invFreq.length, expected.length, `${name}: one frequency a pair`)
  let equal = 0
  let worst = 0
  expected.forEach((value, j) => {
    if (Math.fround(value) === invFreq[j]) equal++
    worst = Math.max(worst, Math.abs(invFreq[j] - value) / value)
  })
  t.ok(worst <= 1e-6, `${name}: relative error ${worst} <= 1e-6`)
  t.ok(
    Array.from(invFreq).every((f) => Math.fround(f) === f),
    `${name}: every frequency is a float32`,
  )
  return equal
}

type TapTest = Pick<typeof t, 'ok' | 'equal' | 'same' | 'comment' | 'notOk'>

t.test('frequencies and rotations of real head sizes equal transformers', async (t) => {
  let equal = 0
  let total = 0
  for (const golden of Object.values<any>(json('rope.json'))) {
    const { head_dim: headDim, positions } = golden
    const rope = readRope({ ...golden.config, rope_parameters: golden.rope_parameters })
    const window = { maxPositionEmbeddings: golden.config.max_position_embeddings }
    const name = `${rope.type} d=${headDim}`
    const start = inverseFrequencies(rope, headDim, window)
    const length = Math.max(...positions) + 1
    const after = inverseFrequencies(rope, headDim, { ...window, length })
    equal += compare(t, { name, invFreq: start.invFreq, expected: golden.inv_freq_at_construction })
    equal += compare(t, { name, invFreq: after.invFreq, expected: golden.inv_freq_after_forward })
    total += headDim
    t.ok(Math.abs(after.attentionScaling - golden.attention_scaling) <= 1e-12, `${name}: attention scaling`)

    const half = headDim / 2
    const table = rotationTable(rope, headDim, { ...window, length, positions: length })
    let worst = 0
    positions.forEach((position: number, row: number) => {
      for (let j = 0; j < half; j++) {
        // the fixture's angle is a float32 product (half a step off) of a frequency that may be one step from ours;
        // its cos and sin are float32 printed with 7 digits (values above 1 to 5e-7)
        const angle = after.invFreq[j] * position
        const step = after.invFreq[j] === Math.fround(golden.inv_freq_after_forward[j]) ? 0 : 2 ** -23
        const tolerance = after.attentionScaling * angle * (2 ** -24 + step) + 6e-7
        for (const kind of ['cos', 'sin'] as const) {
          const error = Math.abs(table[kind][position * half + j] - golden[kind][row][j])
          worst = Math.max(worst, error / tolerance)
        }
      }
    })
    t.ok(worst <= 1, `${name}: cos and sin within ${worst.toFixed(2)} of what float32 angles allow`)
  }
  t.comment(`rope.json: ${equal} of ${total} frequencies equal to the bit`)
  t.ok(equal / total > 0.99, 'equal to the bit: the roundings are in the order of the reference')
})

t.test('frequencies of every model fixture', async (t) => {
  let equal = 0
  let total = 0
  t.equal(caseNames.length, 10)
  for (const name of caseNames) {
    const config = json(`${name}/config.json`)
    const golden = json(`${name}/golden.json`)
    const rope = readRope(config)
    const window = { maxPositionEmbeddings: config.max_position_embeddings }
    const headDim = config.head_dim ?? config.hidden_size / config.num_attention_heads
    const { invFreq, attentionScaling } = inverseFrequencies(rope, headDim, window)
    equal += compare(t, { name, invFreq, expected: golden.rope.inv_freq })
    total += headDim / 2
    t.ok(Math.abs(attentionScaling - golden.rope.attention_scaling) <= 1e-12, `${name}: attention scaling`)
    for (const [length, expected] of Object.entries<number[]>(golden.dynamic_inv_freq ?? {})) {
      const grown = inverseFrequencies(rope, headDim, { ...window, length: Number(length) })
      equal += compare(t, { name: `${name} at ${length} tokens`, invFreq: grown.invFreq, expected })
      total += headDim / 2
    }
  }
  t.comment(`model fixtures: ${equal} of ${total} frequencies equal to the bit`)
  t.ok(equal / total > 0.95)
})

t.test('formulas that no fixture covers', async (t) => {
  const window = { maxPositionEmbeddings: 4096 }
  const ntk = inverseFrequencies({ type: 'ntk', theta: 10000, factor: 16 }, 128, window).invFreq
  const theta = ntkTheta(10000, 16, 128)
  t.ok(Math.abs(theta - 167198) < 1, 'NTK-aware, s = 16, d = 128: base 167198')
  t.strictSame(ntk, inverseFrequencies({ type: 'default', theta }, 128, window).invFreq)

  const short = [1, 1, 1, 1]
  const long = [1, 2, 4, 8]
  const rope: RopeConfig = {
    type: 'longrope',
    theta: 10000,
    shortFactor: short,
    longFactor: long,
    originalMaxPositionEmbeddings: 1024,
  }
  const at = (length: number) => inverseFrequencies(rope, 8, { ...window, length })
  const base = inverseFrequencies({ type: 'default', theta: 10000 }, 8, window).invFreq
  t.strictSame(at(1024).invFreq, base, 'up to the original length: the short factors')
  t.strictSame(
    at(1025).invFreq,
    base.map((f, j) => Math.fround(f / long[j])),
    'beyond it: the long factors',
  )
  t.equal(at(1).attentionScaling, Math.sqrt(1 + Math.log(4) / Math.log(1024)), 'factor = window / original')
  t.equal(inverseFrequencies({ ...rope, attentionFactor: 1.5 }, 8, window).attentionScaling, 1.5)
  t.equal(inverseFrequencies({ ...rope, factor: 1 }, 8, window).attentionScaling, 1)

  const yarn: RopeConfig = { type: 'yarn', theta: 10000, factor: 4, originalMaxPositionEmbeddings: 1024 }
  const scaling = (more: Partial<RopeConfig>) => inverseFrequencies({ ...yarn, ...more }, 64, window).attentionScaling
  const temperature = (m: number) => 0.1 * m * Math.log(4) + 1
  t.equal(scaling({}), temperature(1))
  t.equal(scaling({ attentionFactor: 0 }), 0, 'an explicit attention factor is taken as it is')
  t.equal(scaling({ mscale: 2, mscaleAllDim: 0.5 }), temperature(2) / temperature(0.5))
  t.equal(scaling({ factor: 1 }), 1)
  const exact = inverseFrequencies({ ...yarn, truncate: false }, 64, window).invFreq
  t.notSame(exact, inverseFrequencies(yarn, 64, window).invFreq, 'truncate: false moves the ramp')
  t.notSame(inverseFrequencies({ ...yarn, betaFast: 4, betaSlow: 2 }, 64, window).invFreq, exact)
  // the ramp of one pair only (low = high): the reference widens it by 0.001
  const narrow = inverseFrequencies({ ...yarn, betaFast: 1e9, betaSlow: 1e9 }, 64, window).invFreq
  t.ok(narrow.every(Number.isFinite))

  const one = rotationTable({ type: 'linear', theta: 10000, factor: 2 }, 4, { ...window, positions: 3 })
  t.equal(one.cos.length, 6)
  t.equal(one.cos[0], 1)
  t.equal(one.sin[4], Math.fround(Math.sin(1)), 'position 2 at factor 2 turns like position 1')
  const dynamic: RopeConfig = { type: 'dynamic', theta: 10000, factor: 4 }
  const table = rotationTable(dynamic, 8, { maxPositionEmbeddings: 16, positions: 64 })
  const grown = inverseFrequencies(dynamic, 8, { maxPositionEmbeddings: 16, length: 64 }).invFreq
  t.equal(table.sin[63 * 4 + 1], Math.fround(Math.sin(63 * grown[1])), 'length defaults to the number of positions')
})

t.test('readRope: every spelling', async (t) => {
  t.strictSame(readRope({}), { type: 'default', theta: 10000 })
  t.strictSame(readRope({ rope_theta: 5e5, rope_scaling: null }), { type: 'default', theta: 5e5 })
  const linear4 = { type: 'linear', theta: 10000, factor: 4 }
  for (const config of [
    { rope_scaling: { type: 'linear', factor: 4 } },
    { rope_scaling: { rope_type: 'linear', factor: 4 } },
    { rope_parameters: { rope_type: 'linear', factor: 4, rope_theta: 10000 } },
    { rope_parameters: { rope_type: 'linear', factor: 4 }, rope_theta: 10000, max_position_embeddings: 8192 },
    { rope_scaling: {}, rope_parameters: { rope_type: 'linear', factor: 4 } },
    { rope_scaling: { type: 'linear', factor: 4 }, rope_parameters: { rope_type: 'yarn', factor: 9 } },
    { rope_scaling: { type: 'dynamic', rope_type: 'linear', factor: 4 } },
  ]) {
    t.strictSame(readRope(config), linear4, JSON.stringify(config))
  }
  t.equal(
    readRope({ rope_theta: 7, rope_parameters: { rope_theta: 9, rope_type: 'default' } }).theta,
    9,
    'the theta inside wins over the top level',
  )
  t.strictSame(readRope({ rope_scaling: { type: 'linear', factor: 4 }, original_max_position_embeddings: 2048 }), {
    ...linear4,
    originalMaxPositionEmbeddings: 2048,
  })
  const yarn = { rope_scaling: { rope_type: 'yarn', factor: 4 }, max_position_embeddings: 4096 }
  t.equal(readRope(yarn).originalMaxPositionEmbeddings, 4096, 'yarn computes with it: filled as transformers does')
  const su = { type: 'su', short_factor: [1], long_factor: [2], original_max_position_embeddings: 8 }
  t.strictSame(readRope({ rope_scaling: su }), {
    type: 'longrope',
    theta: 10000,
    originalMaxPositionEmbeddings: 8,
    shortFactor: [1],
    longFactor: [2],
  })
})

t.test('readRope: what is wrong is named', async (t) => {
  const bad: [Record<string, unknown>, RegExp][] = [
    [{ rope_scaling: { type: 'linaer', factor: 4 } }, /rope_scaling\.type: "linaer".*linear/],
    [{ rope_parameters: { rope_type: 'ntk', factor: 4 } }, /rope_parameters\.rope_type: "ntk"/],
    [{ rope_parameters: { rope_type: 'proportional' } }, /rope_type: "proportional"/],
    [{ rope_scaling: { type: 7, factor: 4 } }, /rope_scaling\.type: 7/],
    [{ rope_scaling: { factor: 4 } }, /rope_scaling\.type: missing beside factor 4/],
    [{ rope_scaling: { type: 'linear' } }, /rope_scaling\.factor: missing/],
    [{ rope_scaling: { type: 'linear', factor: '4' } }, /rope_scaling\.factor: "4"/],
    [{ rope_scaling: { type: 'linear', factor: 0.5 } }, /rope_scaling\.factor: 0\.5.*at least 1/],
    [{ rope_scaling: { type: 'dynamic', factor: Infinity } }, /rope_scaling\.factor: Infinity/],
    [{ rope_scaling: { type: 'yarn', factor: NaN } }, /rope_scaling\.factor: NaN/],
    [{ rope_scaling: 'linear' }, /rope_scaling: "linear", but it must be an object/],
    [{ rope_scaling: [4] }, /rope_scaling: \[4\]/],
    [{ rope_theta: 0 }, /rope_theta: 0/],
    [{ rope_theta: '10000' }, /rope_theta: "10000"/],
    [{ rope_parameters: { full_attention: { rope_type: 'default' } } }, /rope_parameters\.full_attention.*per layer/],
    [{ partial_rotary_factor: 0.5 }, /partial_rotary_factor: 0\.5/],
    [{ rope_scaling: { type: 'llama3', factor: 8 } }, /rope_scaling\.low_freq_factor: missing/],
    [
      { rope_scaling: { type: 'llama3', factor: 8, low_freq_factor: 4, high_freq_factor: 4 } },
      /rope_scaling\.high_freq_factor: 4.*above low_freq_factor/,
    ],
    [{ rope_scaling: { type: 'yarn', factor: 8, beta_fast: -1 } }, /rope_scaling\.beta_fast: -1/],
    [{ rope_scaling: { type: 'yarn', factor: 8, truncate: 1 } }, /rope_scaling\.truncate: 1/],
    [{ rope_scaling: { type: 'longrope', short_factor: [1] } }, /rope_scaling\.long_factor: missing/],
    [{ rope_scaling: { type: 'longrope', short_factor: [0], long_factor: [1] } }, /short_factor\[0\]: 0/],
    [
      { rope_scaling: { type: 'longrope', short_factor: 1, long_factor: [1] } },
      /short_factor: 1, but it must be a list/,
    ],
    [
      { rope_scaling: { type: 'yarn', factor: 8, original_max_position_embeddings: 2048.5 } },
      /original_max_position_embeddings: 2048\.5/,
    ],
    [
      { rope_scaling: { type: 'linear', factor: 8 }, rope_parameters: { rope_type: 'linear', rope_theta: 5e5 } },
      /rope_theta: 500000 in rope_parameters/,
    ],
  ]
  for (const [config, message] of bad) t.throws(() => readRope(config), message, JSON.stringify(config))

  const window = { maxPositionEmbeddings: 64 }
  const rope: RopeConfig = { type: 'default', theta: 10000 }
  t.throws(() => inverseFrequencies(rope, 7, window), /headDim: 7/)
  t.throws(() => inverseFrequencies(rope, 8, { maxPositionEmbeddings: 0 }), /maxPositionEmbeddings: 0/)
  t.throws(() => inverseFrequencies(rope, 8, { ...window, length: 1.5 }), /length: 1\.5/)
  t.throws(() => rotationTable(rope, 8, { ...window, positions: -1 }), /positions: -1/)
  const lists: RopeConfig = { type: 'longrope', theta: 10000, shortFactor: [1], longFactor: [1] }
  t.throws(() => inverseFrequencies(lists, 8, window), /shortFactor: 1 numbers, but a head dimension of 8 needs 4/)
  t.throws(
    () => inverseFrequencies({ type: 'dynamic', theta: 1e4, factor: 2 }, 2, { ...window, length: 65 }),
    /headDim/,
  )
  t.throws(() => inverseFrequencies({ type: 'x', theta: 1e4 } as never, 2, window), /type: "x"/)
  t.throws(() => ntkTheta(10000, 4, 2), /headDim: 2/)
})

t.test('writeRope: all spellings, and back', async (t) => {
  const ropes: RopeConfig[] = [
    { type: 'default', theta: 500000 },
    { type: 'default', theta: 167198.1, originalMaxPositionEmbeddings: 2048 },
    { type: 'linear', theta: 10000, factor: 16, originalMaxPositionEmbeddings: 2048 },
    { type: 'linear', theta: 20000, factor: 16 },
    { type: 'dynamic', theta: 20000, factor: 4, originalMaxPositionEmbeddings: 2048 },
    { type: 'yarn', theta: 10000, factor: 8, originalMaxPositionEmbeddings: 4096, betaFast: 16, attentionFactor: 1.1 },
    {
      type: 'llama3',
      theta: 500000,
      factor: 8,
      lowFreqFactor: 1,
      highFreqFactor: 4,
      originalMaxPositionEmbeddings: 8192,
    },
    { type: 'longrope', theta: 10000, shortFactor: [1, 1], longFactor: [2, 3], originalMaxPositionEmbeddings: 4096 },
  ]
  for (const rope of ropes) {
    const written = writeRope(rope)
    t.strictSame(readRope({ ...written }), rope, `${rope.type} comes back`)
    t.strictSame(
      readRope({ ...written, rope_scaling: undefined }),
      rope,
      `${rope.type} comes back through rope_parameters alone`,
    )
    t.equal(written.rope_theta, rope.theta)
    t.equal(written.rope_parameters.rope_theta, rope.theta)
    t.equal(written.rope_parameters.rope_type, rope.type)
    if (rope.type === 'default') t.equal(written.rope_scaling, null)
    else t.equal(written.rope_scaling?.type, rope.type)
  }
  t.strictSame(
    writeRope({ type: 'linear', theta: 10000, factor: 16 }, 2048),
    {
      rope_theta: 10000,
      rope_scaling: { type: 'linear', factor: 16 },
      rope_parameters: { rope_type: 'linear', rope_theta: 10000, factor: 16 },
      original_max_position_embeddings: 2048,
    },
    'exactly two keys in rope_scaling: transformers before 4.43 refuses more',
  )
  t.strictSame(writeRope({ type: 'yarn', theta: 10000, factor: 16 }, 4096).rope_scaling, {
    type: 'yarn',
    rope_type: 'yarn',
    factor: 16,
    original_max_position_embeddings: 4096,
    rope_theta: 10000,
  })
  t.throws(() => writeRope({ type: 'yarn', theta: 10000, factor: 16 }), /originalLength: missing/)
  t.throws(() => writeRope({ type: 'ntk', theta: 10000, factor: 16 }), /"ntk" has no spelling/)
})

t.test('extendRope: composition', async (t) => {
  const base: RopeConfig = { type: 'default', theta: 10000 }
  const linear = extendRope(base, { type: 'linear', factor: 4 }, 2048)
  t.strictSame(linear, { type: 'linear', theta: 10000, factor: 4, originalMaxPositionEmbeddings: 2048 })
  t.strictSame(extendRope(linear, { type: 'linear', factor: 2 }, 8192), { ...linear, factor: 8 })
  const ntk = extendRope(base, { type: 'ntk', factor: 4, headDim: 128 }, 2048)
  t.equal(ntk.type, 'default')
  t.equal(ntk.originalMaxPositionEmbeddings, 2048)
  const twice = extendRope(ntk, { type: 'ntk', factor: 4, headDim: 128 }, 8192)
  t.ok(Math.abs(twice.theta / ntkTheta(10000, 16, 128) - 1) < 1e-12, 'ntk 4 on ntk 4 = ntk 16')
  t.equal(twice.originalMaxPositionEmbeddings, 2048, 'the first original length is kept')
  const both = extendRope(linear, { type: 'ntk', factor: 2, headDim: 128 }, 8192)
  t.strictSame(both, { ...linear, theta: ntkTheta(10000, 2, 128) }, 'ntk on linear: both are in the config')
  const yarn = extendRope(base, { type: 'yarn', factor: 4, betaFast: 16 }, 4096)
  t.strictSame(yarn, { type: 'yarn', theta: 10000, factor: 4, betaFast: 16, originalMaxPositionEmbeddings: 4096 })
  t.strictSame(extendRope(yarn, { type: 'yarn', factor: 2 }, 16384), { ...yarn, factor: 8 })
  const warm = { ...yarn, attentionFactor: 1.2 }
  t.equal(extendRope(warm, { type: 'yarn', factor: 2, attentionFactor: 1.3 }, 16384).attentionFactor, 1.3)
  const llama3 = extendRope(base, { type: 'llama3', factor: 8 }, 8192)
  t.equal(llama3.highFreqFactor, 4)
  t.equal(extendRope(llama3, { type: 'llama3', factor: 2 }, 131072).factor, 16)
  t.equal(extendRope(base, { type: 'dynamic', factor: 2 }, 64).type, 'dynamic')
  const lists = { shortFactor: [1], longFactor: [2] }
  const long = extendRope(base, { type: 'longrope', ...lists }, 64)
  t.strictSame(extendRope(long, { type: 'longrope', shortFactor: [1], longFactor: [4] }, 128).longFactor, [4])
  t.equal(extendRope(ntk, { type: 'yarn', factor: 2 }, 8192).originalMaxPositionEmbeddings, 8192)

  const bad: [RopeConfig, RopeExtension, RegExp][] = [
    [
      llama3,
      { type: 'linear', factor: 2 },
      /"linear" cannot be put on top of this model's "llama3".*Possible here: llama3/,
    ],
    [linear, { type: 'yarn', factor: 2 }, /"yarn" cannot.*"linear" \(factor 4\).*linear or ntk/],
    [yarn, { type: 'linear', factor: 2 }, /Possible here: yarn/],
    [yarn, { type: 'ntk', factor: 2, headDim: 64 }, /Possible here: yarn/],
    [{ type: 'dynamic', theta: 10000, factor: 2 }, { type: 'dynamic', factor: 2 }, /raise max_position_embeddings/],
    [base, { type: 'default' }, /type: "default"/],
    [base, { type: 'nkt' as never, factor: 2 }, /type: "nkt"/],
    [base, { type: 'linear' }, /factor: undefined/],
    [base, { type: 'linear', factor: 0.5 }, /factor: 0\.5/],
    [base, { type: 'linear', factor: 2, betaFast: 3 }, /betaFast: 3 is not an option of "linear"/],
    [base, { type: 'ntk', factor: 2 }, /headDim: 0/],
    [base, { type: 'longrope' }, /shortFactor: missing/],
    [warm, { type: 'yarn', factor: 2 }, /attentionFactor: the model sets 1\.2/],
  ]
  for (const [current, extension, message] of bad) {
    t.throws(() => extendRope(current, extension, 4096), message, JSON.stringify(extension))
  }
  t.throws(() => extendRope(base, { type: 'linear', factor: 2 }, 0), /window: 0/)
})
