// Every barrier and every wait of the CUDA kernels is needed: each is left out once (ROPEWALK_SIMT_SKIP), and then the race
// detector, a deadlock, or other bits in the results must tell. One that nobody misses is superfluous or not tested. Runs
// on the race flavour of the emulator, from scripts/test.js.
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { Device } from '../../lib/runtime/device.js'
import { type EveryCase, everyCase, ODD_SIZES, WHOLE, WIDE } from '../ops/every.js'

const kernels = fileURLToPath(new URL('../../csrc/cuda', import.meta.url))
const folder = mkdtempSync(join(tmpdir(), 'ropewalk-barriers-'))
t.teardown(() => rmSync(folder, { recursive: true }))
const list = join(folder, 'sites')
process.env['ROPEWALK_SIMT_SITES'] = list

/** Lines "12 mma_kernel __syncthreads gemm_mma.h:186", in the order in which they were first reached. */
const sites = (): string[] => (existsSync(list) ? readFileSync(list, 'utf8').trim().split('\n') : [])

/** "gemm_mma.h:186": where the kernels' files have barriers. */
function placesInSources(): string[] {
  const wanted =
    /^[^/]*(__syncthreads\(|__syncwarp\(|named_barrier\(|(cp_async|bulk|mbarrier|wgmma)_wait\w*[<(]|\w*fence\w*\()/
  const files = readdirSync(kernels).filter((name) => /\.(cu|h)$/.test(name) && !name.startsWith('ptx'))
  return files.flatMap((name) =>
    readFileSync(join(kernels, name), 'utf8')
      .split('\n')
      .flatMap((line, i) => (wanted.test(line) ? [`${name}:${i + 1}`] : [])),
  )
}

let device = Device.open('simt')
const text = (results: Uint8Array[]): string => results.map((x) => Buffer.from(x).toString('latin1')).join()

/** The results, or the error. */
async function outcome({ run }: EveryCase): Promise<string> {
  try {
    return text(await run(device))
  } catch (error) {
    device.dispose() // it has failed for good
    device = Device.open('simt')
    return (error as Error).message
  }
}

t.test('each barrier is needed', async (t) => {
  const cases = [...everyCase([], [WHOLE, ODD_SIZES]), ...everyCase(['rmsnorm_fwd', 'rmsnorm_bwd'], [WIDE])]
  const expected: string[] = []
  /** The case that first came by a barrier. */
  const reachedBy: number[] = []
  for (const [i, { run }] of cases.entries()) {
    expected.push(text(await run(device)))
    while (reachedBy.length < sites().length) reachedBy.push(i)
  }

  // What a kernel inlines twice is there twice, with the places that it was called from. Once needed is enough.
  const barriers = new Map<string, { number: string; from: number }[]>()
  for (const [i, line] of sites().entries()) {
    const [, number, what, places] = /^(\d+) (\S+ \S+) (.*)$/.exec(line)!
    const place = places!.split(' from ').find((part) => !part.startsWith('ptx'))!
    const key = `${what} ${place}`
    barriers.set(key, [...(barriers.get(key) ?? []), { number: number!, from: reachedBy[i]! }])
  }
  const reached = [...barriers.keys()].map((key) => key.split(' ').at(-1))
  const left = placesInSources().filter((place) => !reached.includes(place))
  t.strictSame(left, [], 'every barrier of the sources was reached')

  for (const [name, copies] of barriers) {
    let missed = false
    for (const { number, from } of copies) {
      process.env['ROPEWALK_SIMT_SKIP'] = number
      // Mostly the case that came by first tells.
      for (let i = 0; i < cases.length && !missed; i++) {
        const at = (from + i) % cases.length
        missed = (await outcome(cases[at]!)) !== expected[at]
      }
    }
    delete process.env['ROPEWALK_SIMT_SKIP']
    t.ok(missed, `${name} is needed`)
  }
  device.dispose()
})
