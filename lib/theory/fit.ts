/** Rows that are taken in at a time. */
const BLOCK = 512

/**
 * Least squares min |X w - y|^2 + eps |w|^2, rows of X coming in one after the other. Householder reflections fold each
 * block of rows into an upper triangle R with |R w - z| = |X w - y| up to a constant: the condition number is that of X
 * and not, as with the normal equations X'X w = X'y, its square; and memory does not grow with the number of rows.
 */
export class LeastSquares {
  /** R's columns, each (columns), and z. */
  private readonly r: Float64Array[]
  private z: Float64Array
  private readonly block: Float64Array[]
  private readonly targets = new Float64Array(BLOCK)
  private rows = 0

  constructor(readonly columns: number) {
    this.r = Array.from({ length: columns }, () => new Float64Array(columns))
    this.z = new Float64Array(columns)
    this.block = Array.from({ length: columns }, () => new Float64Array(BLOCK))
  }

  /** Takes in a row (columns) and its target. */
  add(row: ArrayLike<number>, target: number): void {
    for (let k = 0; k < this.columns; k++) this.block[k]![this.rows] = row[k]!
    this.targets[this.rows++] = target
    if (this.rows === BLOCK) this.fold()
  }

  /** Reflects the block's rows into the triangle, column by column. */
  private fold(): void {
    if (this.rows > 0) reflect(this.r, this.z, this.block, this.targets, this.rows)
    this.rows = 0
  }

  /** w; eps > 0 is ridge regression, as sqrt(eps) times the unit matrix below X. */
  solve(eps = 0): Float64Array {
    this.fold()
    const { columns } = this
    const r = this.r.map((column) => column.slice())
    const z = this.z.slice()
    if (eps > 0) {
      const unit = r.map((_, k) => new Float64Array(columns).fill(Math.sqrt(eps), k, k + 1))
      reflect(r, z, unit, new Float64Array(columns), columns)
    }
    for (let k = columns - 1; k >= 0; k--) {
      for (let j = k + 1; j < columns; j++) z[k]! -= r[j]![k]! * z[j]!
      // a pivot of exactly 0 leaves its weight free
      z[k] = r[k]![k] === 0 ? 0 : z[k]! / r[k]![k]!
    }
    return z
  }

  /** Singular values of X, the largest first: one-sided Jacobi rotations on the columns of R. */
  singularValues(): Float64Array {
    this.fold()
    const columns = this.r.map((column) => column.slice())
    for (let sweep = 0, turned = true; turned && sweep < 60; sweep++) {
      turned = false
      for (let i = 0; i < columns.length; i++) {
        for (let j = i + 1; j < columns.length; j++) turned = rotate(columns[i]!, columns[j]!) || turned
      }
    }
    return Float64Array.from(columns, (column) => Math.sqrt(dot(column, column))).sort((a, b) => b - a)
  }
}

/** Householder reflections that turn the block's columns into zeros below the triangle (r, z). */
function reflect(
  r: readonly Float64Array[],
  z: Float64Array,
  block: readonly Float64Array[],
  targets: Float64Array,
  rows: number,
): void {
  for (let k = 0; k < r.length; k++) {
    const v = block[k]!.subarray(0, rows)
    const square = dot(v, v)
    if (square === 0) continue
    const pivot = r[k]![k]!
    const norm = Math.sqrt(pivot * pivot + square)
    const head = pivot > 0 ? pivot + norm : pivot - norm
    const tau = 2 / (head * head + square)
    r[k]![k] = pivot - head
    for (let j = k + 1; j <= r.length; j++) {
      const [top, at, below] = j < r.length ? [r[j]!, k, block[j]!] : [z, k, targets]
      let product = head * top[at]!
      for (let i = 0; i < rows; i++) product += v[i]! * below[i]!
      product *= tau
      top[at]! -= product * head
      for (let i = 0; i < rows; i++) below[i]! -= product * v[i]!
    }
  }
}

function dot(a: Float64Array, b: Float64Array): number {
  let sum = 0
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!
  return sum
}

/** Makes two columns orthogonal; false where they are. */
function rotate(a: Float64Array, b: Float64Array): boolean {
  const [aa, bb, ab] = [dot(a, a), dot(b, b), dot(a, b)]
  if (Math.abs(ab) <= 1e-15 * Math.sqrt(aa * bb)) return false
  const zeta = (bb - aa) / (2 * ab)
  const tangent = (zeta < 0 ? -1 : 1) / (Math.abs(zeta) + Math.sqrt(1 + zeta * zeta))
  const cosine = 1 / Math.sqrt(1 + tangent * tangent)
  const sine = cosine * tangent
  for (let i = 0; i < a.length; i++) {
    const left = a[i]!
    a[i] = cosine * left - sine * b[i]!
    b[i] = sine * left + cosine * b[i]!
  }
  return true
}

type FloatArray = Float32Array | Float64Array

/**
 * The normal equations (X'X + eps) w = X'y, as in the paper's code (C.1), by elimination with partial pivoting; every
 * number that is kept is a float32 or a float64. They square the condition number and are here to show what that does;
 * {@link LeastSquares} is the solver.
 */
export class NormalEquations {
  /** The upper half of X'X; both halves once `solve` copies it. */
  private readonly a: FloatArray[]
  private readonly b: FloatArray

  constructor(
    readonly columns: number,
    private readonly numbers: Float32ArrayConstructor | Float64ArrayConstructor,
  ) {
    this.a = Array.from({ length: columns }, () => new numbers(columns))
    this.b = new numbers(columns)
  }

  /** Takes in a row (columns) and its target. */
  add(row: FloatArray, target: number): void {
    const { a, b, columns } = this
    for (let i = 0; i < columns; i++) {
      const [value, line] = [row[i]!, a[i]!]
      for (let j = i; j < columns; j++) line[j]! += value * row[j]!
      b[i]! += value * target
    }
  }

  /** w */
  solve(eps = 0): Float64Array {
    const { columns } = this
    const a = this.a.map((line, i) => line.map((_, j) => (i <= j ? line[j]! : this.a[j]![i]!)))
    const b = new this.numbers(this.b)
    for (let i = 0; i < columns; i++) a[i]![i]! += eps
    for (let k = 0; k < columns; k++) {
      let pivot = k
      for (let i = k + 1; i < columns; i++) if (Math.abs(a[i]![k]!) > Math.abs(a[pivot]![k]!)) pivot = i
      ;[a[k], a[pivot]] = [a[pivot]!, a[k]!]
      ;[b[k], b[pivot]] = [b[pivot]!, b[k]!]
      const top = a[k]!
      if (top[k] === 0) continue
      for (let i = k + 1; i < columns; i++) {
        const line = a[i]!
        const factor = line[k]! / top[k]!
        for (let j = k + 1; j < columns; j++) line[j]! -= factor * top[j]!
        b[i]! -= factor * b[k]!
      }
    }
    for (let k = columns - 1; k >= 0; k--) {
      for (let j = k + 1; j < columns; j++) b[k]! -= a[k]![j]! * b[j]!
      b[k] = a[k]![k] === 0 ? 0 : b[k]! / a[k]![k]!
    }
    return Float64Array.from(b)
  }
}
