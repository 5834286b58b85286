// Keeps docs/api.md, the reference made from the docstrings of what lib/index.ts exports, complete and up to date.
import { spawnSync } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const read = (path: string): string => readFileSync(join(root, path), 'utf8')

t.test('the reference is what the docstrings say, and nothing exported is without one', async (t) => {
  const out = t.testdir()
  // settings in package.json: what has no docstring, or a type that is named but not exported, is an error
  const { status, stdout, stderr } = spawnSync(
    process.execPath,
    ['node_modules/typedoc/bin/typedoc', '--logLevel', 'Warn', '--out', out],
    { cwd: root, encoding: 'utf8' },
  )
  t.equal(status, 0, `${stdout}${stderr}`)
  t.strictSame(readdirSync(out), ['api.md'])
  t.ok(read('docs/api.md') === readFileSync(join(out, 'api.md'), 'utf8'), 'docs/api.md is stale: run `npm run docs`')
})

t.test('the reference names every export, every error code and nothing internal', async (t) => {
  const api = read('docs/api.md')
  const index = read('lib/index.ts').replace(/\/\*[\s\S]*?\*\//g, '')
  const exported = [...index.matchAll(/export (?:type )?\{([^}]+)\}/g)]
    .flatMap(([, names]) => names!.split(','))
    .map((name) => name.replace('type', '').trim())
    .filter((name) => name !== '')
  t.ok(exported.length > 30, `${exported.length} exports`)
  for (const name of exported) t.match(api, new RegExp(`^#+ ${name}(?:\\(\\))?$`, 'm'), name)

  const sources = readdirSync(join(root, 'lib'), { recursive: true, encoding: 'utf8' })
  const codes = sources
    .filter((path) => path.endsWith('.ts') && !path.startsWith('cli'))
    .flatMap((path) => read(join('lib', path)).match(/(?<=')ERR_\w+(?=')/g) ?? [])
  t.ok(codes.length > 50, `${codes.length} codes`)
  // the cache catches its own, and makes the tokens again
  const missing = new Set(codes.filter((code) => code !== 'ERR_CACHE_DAMAGED' && !api.includes(`\`${code}\``)))
  t.strictSame([...missing], [])

  t.notMatch(api, /@internal|releasePasses|loadPlan|downloadChunks/, 'nothing internal')
})
