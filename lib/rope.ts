// Position scaling: from a config's description of RoPE to rotation frequencies. Pure functions, no imports. Formulas
// and papers stand in index.ts; float32 is rounded in the order of transformers 5.18, so that frequencies agree.

/** The types of position scaling, all of them. @category Position scaling */
export const ropeTypes = ['default', 'linear', 'ntk', 'dynamic', 'yarn', 'llama3', 'longrope'] as const
/** A type of position scaling. @category Position scaling */
export type RopeType = (typeof ropeTypes)[number]

/** What a checkpoint says of its positions; each type has its own fields. @category Position scaling */
export type RopeConfig = {
  /** Which of the formulas above. */ type: RopeType
  /** Base of the frequencies, above 1; LLaMA 10000, Llama 3 500000. */ theta: number
  /** s, at least 1; all types but `default` need it, `longrope` infers M / L. */ factor?: number
  /** L, in tokens; default: the config's max_position_embeddings. */ originalMaxPositionEmbeddings?: number
  /** yarn, longrope: the scale of cos and sin, in place of the formula's. */ attentionFactor?: number
  /** yarn: pairs with more turns in L are kept; default 32. */ betaFast?: number
  /** yarn: pairs with fewer turns in L are interpolated whole; default 1. */ betaSlow?: number
  /** yarn, only with mscaleAllDim: scale (0.1 mscale ln s + 1) / (0.1 mscaleAllDim ln s + 1). */ mscale?: number
  /** yarn: see mscale. */ mscaleAllDim?: number
  /** yarn: whether the ends of the ramp are rounded to whole pairs; default true. */ truncate?: boolean
  /** llama3, needed: L / lowFreqFactor is the wavelength above which w becomes w / s. */ lowFreqFactor?: number
  /** llama3, needed, above lowFreqFactor: below L / highFreqFactor w is kept. */ highFreqFactor?: number
  /** longrope, needed: (D/2) divisors of w for sequences up to L. */ shortFactor?: number[]
  /** longrope, needed: (D/2) divisors of w for longer ones. */ longFactor?: number[]
}

/** The lengths, in tokens, that frequencies depend on. @category Position scaling */
export type RopeWindow = {
  /** M of the config. */ maxPositionEmbeddings: number
  /** N of the sequence (dynamic, longrope); default M; rotationTable: the last position + 1. */ length?: number
}

/** config.json's name of each field of RopeConfig. */
const jsonNames = {
  factor: 'factor',
  originalMaxPositionEmbeddings: 'original_max_position_embeddings',
  attentionFactor: 'attention_factor',
  betaFast: 'beta_fast',
  betaSlow: 'beta_slow',
  mscale: 'mscale',
  mscaleAllDim: 'mscale_all_dim',
  truncate: 'truncate',
  lowFreqFactor: 'low_freq_factor',
  highFreqFactor: 'high_freq_factor',
  shortFactor: 'short_factor',
  longFactor: 'long_factor',
} as const

type Field = keyof typeof jsonNames

/** The fields each type understands, as transformers 5.18 validates them. */
const fieldsOf: Record<RopeType, readonly Field[]> = {
  default: [],
  linear: ['factor'],
  ntk: ['factor'],
  dynamic: ['factor'],
  yarn: ['factor', 'attentionFactor', 'betaFast', 'betaSlow', 'mscale', 'mscaleAllDim', 'truncate'],
  llama3: ['factor', 'lowFreqFactor', 'highFreqFactor'],
  longrope: ['factor', 'attentionFactor', 'shortFactor', 'longFactor'],
}

const requiredOf: Record<RopeType, readonly Field[]> = {
  default: [],
  linear: ['factor'],
  ntk: ['factor'],
  dynamic: ['factor'],
  yarn: ['factor'],
  llama3: ['factor', 'lowFreqFactor', 'highFreqFactor'],
  longrope: ['shortFactor', 'longFactor'],
}

const f32 = Math.fround

/** theta of static NTK-aware scaling, theta factor^(D/(D-2)); RangeError unless D > 2. @category Position scaling */
export function ntkTheta(theta: number, factor: number, headDim: number): number {
  checkFactor(factor, 'factor')
  if (!Number.isInteger(headDim) || headDim <= 2) {
    throw new RangeError(`headDim: ${show(headDim)}, but NTK-aware scaling needs an even head dimension above 2`)
  }
  return theta * factor ** (headDim / (headDim - 2))
}

/**
 * Angles per position of each pair of a head: `invFreq` (headDim / 2), every value exactly a float32, as
 * LlamaRotaryEmbedding of transformers 5.18 holds it; cos and sin are to be multiplied by `attentionScaling`.
 * Throws TypeError or RangeError for an invalid description. @category Position scaling
 */
export function inverseFrequencies(
  rope: RopeConfig,
  headDim: number,
  window: RopeWindow,
): { invFreq: Float64Array; attentionScaling: number } {
  checkRope(rope, '', headDim)
  const { maxPositionEmbeddings, length = maxPositionEmbeddings } = window
  checkLength(maxPositionEmbeddings, 'maxPositionEmbeddings')
  checkLength(length, 'length')
  const factor = rope.factor ?? 1
  switch (rope.type) {
    case 'default':
      return { invFreq: powers(rope.theta, headDim).map((p) => f32(1 / p)), attentionScaling: 1 }
    case 'linear':
      return {
        invFreq: powers(rope.theta, headDim).map((p) => f32(f32(1 / p) / f32(factor))),
        attentionScaling: 1,
      }
    case 'ntk': {
      const theta = ntkTheta(rope.theta, factor, headDim)
      return { invFreq: powers(theta, headDim).map((p) => f32(1 / p)), attentionScaling: 1 }
    }
    case 'dynamic': {
      const theta = dynamicTheta(rope.theta, factor, headDim, maxPositionEmbeddings, length)
      return { invFreq: powers(theta, headDim).map((p) => f32(1 / p)), attentionScaling: 1 }
    }
    case 'yarn':
      return yarn(rope, headDim, maxPositionEmbeddings)
    case 'llama3':
      return { invFreq: llama3(rope, headDim, maxPositionEmbeddings), attentionScaling: 1 }
    case 'longrope':
      return longrope(rope, headDim, maxPositionEmbeddings, length)
  }
}

/**
 * cos and sin, each (P, headDim / 2), of the positions 0 .. P-1, or of those listed. The angle is a float64 product of
 * the float32 frequency and the position (a float32 angle is off by 1e-3 at position 32,768), rounded once at the end.
 * Scaled as the type says. Throws TypeError or RangeError for an invalid description. @category Position scaling
 */
export function rotationTable(
  rope: RopeConfig,
  headDim: number,
  window: RopeWindow & { positions: number | readonly number[] },
): { cos: Float32Array; sin: Float32Array } {
  const list = typeof window.positions === 'number' ? undefined : window.positions
  const rows = list ? list.length : (window.positions as number)
  checkLength(rows, 'positions')
  const length = window.length ?? (list ? Math.max(...list) + 1 : rows)
  const { invFreq, attentionScaling } = inverseFrequencies(rope, headDim, { ...window, length })
  const half = invFreq.length
  const cos = new Float32Array(rows * half)
  const sin = new Float32Array(rows * half)
  for (let row = 0; row < rows; row++) {
    const position = list ? list[row] : row
    for (let j = 0; j < half; j++) {
      const angle = invFreq[j] * position
      cos[row * half + j] = Math.cos(angle) * attentionScaling
      sin[row * half + j] = Math.sin(angle) * attentionScaling
    }
  }
  return { cos, sin }
}

/**
 * The rope description of a config.json. `rope_scaling` (4.x, with `type` or `rope_type`) wins over `rope_parameters`
 * (5.x); a missing theta comes from the top level, else 10000: as transformers 5.18 resolves them. Throws TypeError or
 * RangeError, naming the field, for what loaders would read in different ways. @category Position scaling
 */
export function readRope(config: Record<string, unknown>): RopeConfig {
  const scaling = section(config, 'rope_scaling')
  const parameters = section(config, 'rope_parameters')
  const name = scaling !== undefined ? 'rope_scaling' : 'rope_parameters'
  const chosen = scaling ?? parameters ?? {}
  const partial = chosen.partial_rotary_factor ?? config.partial_rotary_factor
  if (partial !== undefined && partial !== null && partial !== 1) {
    throw new RangeError(`partial_rotary_factor: ${show(partial)}, but only 1 (the whole head is rotated) is supported`)
  }
  const theta = chosen.rope_theta ?? config.rope_theta ?? undefined
  if (theta === undefined && scaling !== undefined && (parameters?.rope_theta ?? undefined) !== undefined) {
    throw new RangeError(
      `rope_theta: ${show(parameters?.rope_theta)} in rope_parameters, but rope_scaling is there too and wins, and has ` +
        'no rope_theta: loaders would take 10000. Add rope_theta at the top level of the config',
    )
  }
  const rope: RopeConfig = { type: readType(chosen, name), theta: (theta ?? 10000) as number }
  for (const field of fieldsOf[rope.type]) {
    const value = chosen[jsonNames[field]]
    if (value !== undefined && value !== null) Object.assign(rope, { [field]: copyOf(value) })
  }
  // transformers gives the top-level value priority for the types that compute with it
  const original =
    config.original_max_position_embeddings ??
    chosen.original_max_position_embeddings ??
    parameters?.original_max_position_embeddings ??
    (computesWithOriginal(rope.type) ? config.max_position_embeddings : undefined)
  if (original !== undefined && original !== null) rope.originalMaxPositionEmbeddings = original as number
  checkRope(rope, `${name}.`)
  return rope
}

/**
 * What config.json must say, in every spelling that loaders read, so that none falls back to theta 10000 and no
 * scaling. Assign all four keys; one that is undefined is to be deleted from the config. `originalLength` (tokens)
 * serves where `rope` has none; yarn, llama3 and longrope need it. RangeError for `ntk`.
 *
 * linear and dynamic get exactly {type, factor}: transformers 4.31 to 4.42 refuse any other key there, later ones
 * accept it and fill theta from the top level. yarn and llama3 need max_position_embeddings = original * factor beside
 * them: transformers 4.5x computes the factor from that ratio. @category Position scaling
 */
export function writeRope(
  rope: RopeConfig,
  originalLength?: number,
): {
  rope_theta: number
  rope_scaling: Record<string, unknown> | null
  rope_parameters: Record<string, unknown>
  original_max_position_embeddings: number | undefined
} {
  checkRope(rope, '')
  if (rope.type === 'ntk') {
    throw new RangeError(
      'type: "ntk" has no spelling in config.json: write it as "default" with theta = ntkTheta(theta, factor, headDim); ' +
        'extendRope returns it so',
    )
  }
  const original = rope.originalMaxPositionEmbeddings ?? originalLength
  if (original !== undefined) checkLength(original, 'originalLength')
  const inside: Record<string, unknown> = {}
  for (const field of fieldsOf[rope.type]) {
    if (rope[field] !== undefined) inside[jsonNames[field]] = copyOf(rope[field])
  }
  if (computesWithOriginal(rope.type)) {
    if (original === undefined) {
      throw new RangeError(`originalLength: missing, but rope type "${rope.type}" computes with it`)
    }
    inside.original_max_position_embeddings = original
  }
  const scaling: Record<string, unknown> | null =
    rope.type === 'default'
      ? null
      : rope.type === 'linear' || rope.type === 'dynamic'
        ? { type: rope.type, ...inside }
        : { type: rope.type, rope_type: rope.type, ...inside, rope_theta: rope.theta }
  return {
    rope_theta: rope.theta,
    rope_scaling: scaling,
    rope_parameters: { rope_type: rope.type, rope_theta: rope.theta, ...inside },
    original_max_position_embeddings: original,
  }
}

/** One extension: a type, its factor and its options; ntk needs D as `headDim`. @category Position scaling */
export type RopeExtension = Partial<Omit<RopeConfig, 'type' | 'theta'>> & { type: RopeType; headDim?: number }

/**
 * The description after stretching `current`, whose model has a window of `window` tokens (its
 * max_position_embeddings), by `extension`. Extensions compose where a config can say the result: linear on linear
 * (factors multiply), ntk on default or linear (theta grows), yarn on yarn and llama3 on llama3 (factors multiply over
 * the first original length), longrope on longrope (its lists are absolute and replace the old ones). ntk comes back as
 * type "default" with the new theta: the only spelling that loaders know. Throws RangeError for what no config can say,
 * TypeError for options of another type. @category Position scaling
 */
export function extendRope(current: RopeConfig, extension: RopeExtension, window: number): RopeConfig {
  checkRope(current, 'current.')
  checkLength(window, 'window')
  const { type, headDim, ...options } = extension
  if (!ropeTypes.includes(type) || type === 'default') {
    throw new RangeError(`type: ${show(type)}; a context is extended by ${ropeTypes.slice(1).join(', ')}`)
  }
  const allowed = new Set<string>([...fieldsOf[type], 'originalMaxPositionEmbeddings'])
  for (const [key, value] of Object.entries(options)) {
    if (value !== undefined && !allowed.has(key)) {
      throw new TypeError(`${key}: ${show(value)} is not an option of "${type}"; it has ${[...allowed].join(', ')}`)
    }
  }
  const given = Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined))
  if (type !== 'longrope') checkFactor(extension.factor, 'factor')
  const factor = extension.factor ?? 1
  const { theta } = current
  if (type === 'ntk' && (current.type === 'default' || current.type === 'linear')) {
    const original = { originalMaxPositionEmbeddings: current.originalMaxPositionEmbeddings ?? window }
    return { ...current, ...(current.type === 'default' ? original : {}), theta: ntkTheta(theta, factor, headDim ?? 0) }
  }
  if (current.type === 'default') {
    const llama3Defaults = type === 'llama3' ? { lowFreqFactor: 1, highFreqFactor: 4 } : {}
    const next: RopeConfig = { type, theta, originalMaxPositionEmbeddings: window, ...llama3Defaults, ...given }
    checkRope(next, '')
    return next
  }
  if (current.type === type && type !== 'dynamic') {
    if (type === 'yarn') checkAttention(current, extension)
    const next: RopeConfig = { ...current, ...given, theta }
    if (type !== 'longrope') next.factor = (current.factor ?? 1) * factor
    if (current.originalMaxPositionEmbeddings !== undefined) {
      next.originalMaxPositionEmbeddings = current.originalMaxPositionEmbeddings
    }
    checkRope(next, '')
    return next
  }
  const possible = { linear: 'linear or ntk', dynamic: '', yarn: 'yarn', llama3: 'llama3', longrope: 'longrope' }
  const answer = possible[current.type as keyof typeof possible]
  throw new RangeError(
    `type: "${type}" cannot be put on top of this model's "${current.type}" (factor ${current.factor}): no config.json ` +
      `says the two together. ${
        answer
          ? `Possible here: ${answer}`
          : 'dynamic already stretches with the sequence: raise max_position_embeddings'
      }`,
  )
}

// ---- frequencies

/** theta^(2j / d) for j < d/2, in float32. */
function powers(theta: number, headDim: number): Float64Array {
  const base = f32(theta)
  return Float64Array.from({ length: headDim / 2 }, (_, j) => f32(base ** f32((2 * j) / headDim)))
}

/** base * ((s * N / L) - (s - 1))^(d / (d - 2)) for N > L; in float32, as N is a tensor where transformers does this. */
function dynamicTheta(theta: number, factor: number, headDim: number, limit: number, length: number): number {
  if (length <= limit) return theta
  if (headDim <= 2)
    throw new RangeError(`headDim: ${headDim}, but dynamic scaling needs an even head dimension above 2`)
  const stretch = f32(f32(f32(f32(factor) * length) / limit) - f32(factor - 1))
  // torch keeps the exponent of a scalar power in float64
  return f32(f32(theta) * f32(stretch ** (headDim / (headDim - 2))))
}

function yarn(
  rope: RopeConfig,
  headDim: number,
  maxPositionEmbeddings: number,
): { invFreq: Float64Array; attentionScaling: number } {
  const { theta, factor = 1, truncate = true, mscale, mscaleAllDim } = rope
  const original = rope.originalMaxPositionEmbeddings ?? maxPositionEmbeddings
  // `or` in the reference: zero means the default
  const betaFast = rope.betaFast || 32
  const betaSlow = rope.betaSlow || 1
  // the pair that turns r times over the original length: d ln(L / (2 pi r)) / (2 ln base)
  const turns = (r: number): number => (headDim * Math.log(original / (r * 2 * Math.PI))) / (2 * Math.log(theta))
  const low = Math.max(truncate ? Math.floor(turns(betaFast)) : turns(betaFast), 0)
  const cut = Math.min(truncate ? Math.ceil(turns(betaSlow)) : turns(betaSlow), headDim - 1)
  const high = cut === low ? cut + 0.001 : cut
  const invFreq = powers(theta, headDim).map((p, j) => {
    const ramp = Math.min(Math.max(f32(f32(j - f32(low)) / f32(high - low)), 0), 1)
    const extrapolated = f32(1 - ramp)
    const interpolated = f32(f32(1 / f32(f32(factor) * p)) * f32(1 - extrapolated))
    return f32(interpolated + f32(f32(1 / p) * extrapolated))
  })
  const temperature = (scale: number): number => (factor <= 1 ? 1 : 0.1 * scale * Math.log(factor) + 1)
  const inferred = mscale && mscaleAllDim ? temperature(mscale) / temperature(mscaleAllDim) : temperature(1)
  return { invFreq, attentionScaling: rope.attentionFactor ?? inferred }
}

function llama3(rope: RopeConfig, headDim: number, maxPositionEmbeddings: number): Float64Array {
  const { theta, factor = 1, lowFreqFactor: low = 1, highFreqFactor: high = 4 } = rope
  const original = rope.originalMaxPositionEmbeddings ?? maxPositionEmbeddings
  const lowWavelength = f32(original / low)
  const highWavelength = f32(original / high)
  return powers(theta, headDim).map((p) => {
    const kept = f32(1 / p)
    // scalar / tensor is reciprocal * scalar in torch
    const wavelength = f32(f32(1 / kept) * f32(2 * Math.PI))
    if (wavelength > lowWavelength) return f32(kept / f32(factor))
    if (wavelength < highWavelength) return kept
    const smooth = f32(f32(f32(f32(1 / wavelength) * original) - f32(low)) / f32(high - low))
    return f32(f32(f32(f32(1 - smooth) * kept) / f32(factor)) + f32(smooth * kept))
  })
}

function longrope(
  rope: RopeConfig,
  headDim: number,
  maxPositionEmbeddings: number,
  length: number,
): { invFreq: Float64Array; attentionScaling: number } {
  const original = rope.originalMaxPositionEmbeddings ?? maxPositionEmbeddings
  const factor = rope.factor ?? maxPositionEmbeddings / original
  const stretch = ((length > original ? rope.longFactor : rope.shortFactor) ?? []) as number[]
  const invFreq = powers(rope.theta, headDim).map((p, j) => f32(1 / f32(f32(stretch[j]) * p)))
  const inferred = factor <= 1 ? 1 : Math.sqrt(1 + Math.log(factor) / Math.log(original))
  return { invFreq, attentionScaling: rope.attentionFactor ?? inferred }
}

// ---- checks

function section(config: Record<string, unknown>, name: string): Record<string, unknown> | undefined {
  const value = config[name]
  if (value === undefined || value === null) return undefined
  if (typeof value !== 'object' || Array.isArray(value)) {
    throw new TypeError(
      `${name}: ${show(value)}, but it must be an object such as {"type": "linear", "factor": 4}, or null`,
    )
  }
  const entries = Object.entries(value)
  const nested = entries.find(([, inner]) => typeof inner === 'object' && inner !== null && !Array.isArray(inner))
  if (nested !== undefined) {
    throw new RangeError(
      `${name}.${nested[0]}: ${show(nested[1])}, but one rope description per layer type is not supported: a LLaMA has one`,
    )
  }
  // an empty object says nothing: the other spelling then counts, as in transformers
  return entries.length === 0 ? undefined : (value as Record<string, unknown>)
}

function readType(chosen: Record<string, unknown>, name: string): RopeType {
  const key = chosen.rope_type === undefined ? 'type' : 'rope_type'
  const value = chosen[key]
  if (value === undefined || value === null) {
    if (chosen.factor !== undefined) {
      throw new RangeError(
        `${name}.type: missing beside factor ${show(chosen.factor)}: loaders would not scale at all. Name one of ` +
          configTypes.join(', '),
      )
    }
    return 'default'
  }
  if (value === 'su') return 'longrope'
  if (!configTypes.includes(value as string)) {
    throw new RangeError(`${name}.${key}: ${show(value)}; the known types are ${configTypes.join(', ')}`)
  }
  return value as RopeType
}

const configTypes: readonly string[] = ropeTypes.filter((type) => type !== 'ntk')

function computesWithOriginal(type: RopeType): boolean {
  return type === 'yarn' || type === 'llama3' || type === 'longrope'
}

function checkRope(rope: RopeConfig, at: string, headDim?: number): void {
  if (!ropeTypes.includes(rope.type)) {
    throw new RangeError(`${at}type: ${show(rope.type)}; the known types are ${ropeTypes.join(', ')}`)
  }
  if (headDim !== undefined && (!Number.isInteger(headDim) || headDim < 2 || headDim % 2 !== 0)) {
    throw new RangeError(`headDim: ${show(headDim)}, but rotary pairs need an even head dimension of at least 2`)
  }
  const spell = (field: Field): string => (at.startsWith('rope_') ? jsonNames[field] : field)
  checkNumber(rope.theta, at.startsWith('rope_') ? 'rope_theta' : `${at}theta`, 1, 'above')
  for (const field of requiredOf[rope.type]) {
    if (rope[field] === undefined) {
      throw new TypeError(`${at}${spell(field)}: missing, but rope type "${rope.type}" needs it`)
    }
  }
  if (rope.factor !== undefined) checkFactor(rope.factor, at + spell('factor'))
  if (rope.originalMaxPositionEmbeddings !== undefined) {
    checkLength(rope.originalMaxPositionEmbeddings, at + spell('originalMaxPositionEmbeddings'))
  }
  for (const field of ['attentionFactor', 'betaFast', 'betaSlow', 'mscale', 'mscaleAllDim'] as const) {
    if (rope[field] !== undefined) checkNumber(rope[field], at + spell(field), 0, 'least')
  }
  for (const field of ['lowFreqFactor', 'highFreqFactor'] as const) {
    if (rope[field] !== undefined) checkNumber(rope[field], at + spell(field), 0, 'above')
  }
  if (rope.type === 'llama3' && (rope.highFreqFactor as number) <= (rope.lowFreqFactor as number)) {
    throw new RangeError(
      `${at}${spell('highFreqFactor')}: ${rope.highFreqFactor}, but it must be above ${spell('lowFreqFactor')} ` +
        `(${rope.lowFreqFactor})`,
    )
  }
  if (rope.truncate !== undefined && typeof rope.truncate !== 'boolean') {
    throw new TypeError(`${at}truncate: ${show(rope.truncate)}, but it must be true or false`)
  }
  for (const field of ['shortFactor', 'longFactor'] as const) checkList(rope[field], at + spell(field), headDim)
}

function checkList(list: unknown, name: string, headDim: number | undefined): void {
  if (list === undefined) return
  if (!Array.isArray(list)) throw new TypeError(`${name}: ${show(list)}, but it must be a list of numbers`)
  list.forEach((value, j) => checkNumber(value, `${name}[${j}]`, 0, 'above'))
  if (headDim !== undefined && list.length !== headDim / 2) {
    throw new RangeError(`${name}: ${list.length} numbers, but a head dimension of ${headDim} needs ${headDim / 2}`)
  }
}

function checkFactor(value: unknown, name: string): void {
  checkNumber(value, name, 1, 'least')
}

function checkNumber(value: unknown, name: string, bound: number, kind: 'least' | 'above'): void {
  const rule = kind === 'least' ? `a finite number of at least ${bound}` : `a finite number above ${bound}`
  if (typeof value !== 'number') throw new TypeError(`${name}: ${show(value)}, but it must be ${rule}`)
  if (!Number.isFinite(value) || value < bound || (kind === 'above' && value === bound)) {
    throw new RangeError(`${name}: ${value}, but it must be ${rule}`)
  }
}

function checkLength(value: unknown, name: string): void {
  if (typeof value !== 'number') throw new TypeError(`${name}: ${show(value)}, but it must be a count of tokens`)
  if (!Number.isSafeInteger(value) || value < 1) {
    throw new RangeError(`${name}: ${value}, but it must be a whole number of tokens, at least 1`)
  }
}

/** A temperature that was set by hand does not follow from the new factor: it must be given again. */
function checkAttention(current: RopeConfig, extension: RopeExtension): void {
  if (current.attentionFactor === undefined || extension.attentionFactor !== undefined) return
  throw new RangeError(
    `attentionFactor: the model sets ${current.attentionFactor} for factor ${current.factor}; say which it shall have ` +
      'for the new factor (0.1 ln(factor) + 1 is the usual one)',
  )
}

function copyOf(value: unknown): unknown {
  return Array.isArray(value) ? [...value] : value
}

function show(value: unknown): string {
  const text = typeof value === 'bigint' ? String(value) : (JSON.stringify(value) ?? String(value))
  return text.length > 80 ? `${text.slice(0, 77)}...` : text
}
